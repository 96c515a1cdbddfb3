"""The door between the local store and anywhere else: what is published of a version, and a verified way in."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adapterhub_lite.registry.manifest import AdapterManifest

if TYPE_CHECKING:
    from adapterhub_lite.bases import ResolvedBase
    from adapterhub_lite.registry.store import AdapterRegistry


def adapter_files(registry: "AdapterRegistry", manifest: AdapterManifest) -> dict[str, Path]:
    """What is published of a version: file name -> immutable local file, `adapterhub.json` included, card not."""
    raise NotImplementedError


def import_adapter(
    registry: "AdapterRegistry",
    folder: Path,
    *,
    name: str | None = None,
    expected: AdapterManifest | None = None,
    base: "ResolvedBase | None" = None,
    verify: Literal["files", "canary"] = "files",
) -> AdapterManifest:
    """Take in a folder that came from elsewhere, keeping its manifest (version number, records, digest)."""
    raise NotImplementedError
