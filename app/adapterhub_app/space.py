"""What a Hugging Face Space runs: pulls the configured adapters and serves the app to viewers."""

import os
import tempfile
from pathlib import Path

from adapterhub_app.access import Access
from adapterhub_app.launch import launch
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine


def read_access(users: str | None) -> Access:
    """The access rules of a public page: logins from the JSON text `users`; without it everybody is a viewer."""
    if not users:
        return Access(open_role="viewer")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "users.json"
        file.touch(mode=0o600)
        file.write_text(users, encoding="utf-8")
        return Access.read(file)


def pull_all(registry: AdapterRegistry, repositories: str) -> list[str]:
    """Pull each `org/name` or `org/name@alias` of a comma-separated list; returns the local references."""
    references = []
    for item in filter(None, (part.strip() for part in repositories.split(","))):
        repo, _, alias = item.partition("@")
        receipt = registry.pull(repo, revision=f"@{alias}" if alias else None)
        references.append(receipt.manifest.reference)
    return references


def main() -> None:
    """Serve the app on the address and port that a Space expects."""
    name = os.environ.get("ADAPTERHUB_BASE", "smollm2-135m")
    access = read_access(os.environ.get("ADAPTERHUB_USERS"))
    registry = AdapterRegistry()
    pull_all(registry, os.environ.get("ADAPTERHUB_PULL", ""))
    base = resolve_base(name)
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    with InferenceEngine.from_base(name, registry=registry) as engine:
        # A Space's proxy reaches the app from outside its container.
        launch(
            engine, registry, host="0.0.0.0", port=port, base_name=base.name, base=base, access=access,  # noqa: S104
            hosts=[os.environ.get("SPACE_HOST", "")], frame_ancestors=["https://huggingface.co"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
