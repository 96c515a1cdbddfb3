"""The registry: where adapters live on this machine."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry.manifest import AdapterManifest
from adapterhub_lite.registry.reference import AdapterReference

if TYPE_CHECKING:
    from adapterhub_lite.bases import ResolvedBase


class AdapterRegistry:
    """Versions of adapters under `$ADAPTERHUB_HOME`."""

    def __init__(self, home: str | Path | None = None) -> None:
        self.home = adapterhub_home(home)

    def add(
        self, folder: str | Path, name: str, *, base: "ResolvedBase | None" = None, tags: Iterable[str] = (), **about: Any
    ) -> AdapterManifest:
        """Validate the adapter in `folder` and keep it as the next version of `name`."""
        raise NotImplementedError

    def resolve(self, reference: "str | AdapterReference") -> AdapterManifest:
        """The manifest that `reference` names now."""
        raise NotImplementedError

    def file(self, manifest: AdapterManifest, filename: str) -> Path:
        """The immutable local file `filename` of a version."""
        raise NotImplementedError
