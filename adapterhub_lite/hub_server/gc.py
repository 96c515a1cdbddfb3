"""Freeing contents that no commit names any more: of deleted repositories, and of uploads that were never committed."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.hub_server.server import claim
from adapterhub_lite.hub_server.store import HubStore
from adapterhub_lite.hub_server.xet import XetStore


@dataclass(frozen=True)
class Collected:
    """What was freed, or would be: contents by sha256, and bytes."""

    contents: tuple[str, ...]
    freed_bytes: int


def collect(data: Path, *, dry_run: bool = False) -> Collected:
    """Remove every content under `data` that no commit of any repository names.

    The Xet side keeps its own copies; it is rebuilt from the contents that stay.

    Raises:
        ResourceError: a hub is running on the folder: an upload there may be about to be committed.
    """
    with ExitStack() as held:
        held.callback(claim(data))
        store = HubStore(data)
        named = {sha256 for repo in store.repos() for sha256 in store.named_contents(repo.key)}
        gone = {path.parent.name + path.name: path for path in (data / "blobs").glob("??/*")}
        gone = {sha256: path for sha256, path in gone.items() if sha256 not in named}
        size = sum(path.stat().st_size for path in gone.values())
        if not dry_run and gone:
            for path in gone.values():
                path.unlink()
            xet = XetStore(data.resolve() / "xet")
            kept = [sha256 for sha256 in named if xet.hash_of(sha256)]
            had = xet.size()
            shutil.rmtree(xet.main, ignore_errors=True)
            for sha256 in kept:
                xet.keep(sha256, store.blob(sha256))
            size += had - xet.size()
        return Collected(tuple(sorted(gone)), size)
