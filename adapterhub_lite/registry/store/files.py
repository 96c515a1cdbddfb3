"""Files that are still there after a power cut, and file contents under their sha256. Knows no adapters and no database.

A name is on disk once its folder was fsynced, which holds for a folder's own name too. Hence the law of `objects/`: a
file at its final name is complete and on disk. It is written aside, fsynced, renamed, and the folder fsynced.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import FileRecord

BLOCK_BYTES = 1 << 20


def make_folder(folder: Path) -> None:
    """Make `folder` and whatever is missing above it; again is no error."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: written aside, fsynced, renamed, the folder fsynced."""
    make_folder(path.parent)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ObjectStore:
    """`objects/` under a home folder: immutable contents, shared between versions."""

    def __init__(self, home: Path) -> None:
        self.root = home / "objects" / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the content with this sha256 (64 hex digits) lies, whether it is there or not."""
        return self.root / sha256[:2] / sha256[2:]

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
