"""File contents under their sha256, immutable, shared between versions. Knows no adapters and no database.

Law of the folder: a file at its final name is complete and on disk. It is written aside, fsynced, renamed, and the
folder fsynced.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import FileRecord
from adapterhub_lite.registry.store.durable import fsync_folder, make_folder
from adapterhub_lite.registry.store.locks import store_lock

BLOCK_BYTES = 1 << 20


class ObjectStore:
    """`objects/` and `staging/` under a home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "objects" / "sha256"
        self.staging_root = home / "staging"

    def path(self, sha256: str) -> Path:
        """Where the content with this sha256 (64 hex digits) lies, whether it is there or not."""
        return self.root / sha256[:2] / sha256[2:]

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder on the same disk, gone at the end; collection waits for it."""
        with store_lock(self.home, exclusive=False):
            self.staging_root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.staging_root))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, path: Path) -> FileRecord:
        """Move the staged file at `path` to its final name, over a damaged one if need be; returns its record."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        record = file_record(path)
        target = self.path(record.sha256)
        if target.exists() and file_record(target) == record:
            path.unlink()
            return record
        make_folder(target.parent)
        path.chmod(0o444)
        path.rename(target)
        fsync_folder(target.parent)
        return record

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        """Every object: sha256 by its name, and its path."""
        for folder in sorted(self.root.glob("??")):
            for path in sorted(folder.iterdir()):
                yield folder.name + path.name, path


def stage_file(source: Path, target: Path, *, limit: int) -> None:
    """Copy `source`, a plain file of at most `limit` bytes; a link put there meanwhile is not followed."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
        remaining = limit
        while block := reader.read(min(BLOCK_BYTES, remaining)):
            writer.write(block)
            remaining -= len(block)


def file_record(path: Path) -> FileRecord:
    """The sha256 and size of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, size=path.stat().st_size)
