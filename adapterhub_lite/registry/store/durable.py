"""Files and folders that are still there after a power cut. Knows the file system and nothing that is kept in it.

A name is on disk once its folder was fsynced, which holds for a folder's own name too.
"""

import os
import tempfile
from pathlib import Path


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
