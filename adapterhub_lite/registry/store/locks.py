"""Locks between processes, on files under a home folder; the kernel lets go of them when a process dies."""

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry.store.durable import make_folder

LOCK_SECONDS = 60.0
# Where pulls lay down what they fetch, a folder each, until it is whole.
PULLS = "hub"


@contextmanager
def store_lock(home: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the store: shared by those who add or move, exclusive for the one who collects or rebuilds.

    Not re-entrant: a thread that holds it exclusively and asks again waits for itself.

    Raises:
        RegistryError: it was not free within a minute.
    """
    make_folder(home)
    with (home / "store.lock").open("a") as file:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(file, kind):
            if time.monotonic() > deadline:
                raise RegistryError(f"Other processes kept {home} busy for {LOCK_SECONDS:g} s. Try again.")
            time.sleep(0.005)
        yield


def pull_lock(folder: Path) -> str:
    """The file whose lock a pull into `folder` holds."""
    return f"{folder}.lock"


class Lease:
    """A running server's word that it uses an adapter; it ends with `release`, the `with` block, the last reference to
    it, or the process.

    `effective` is False in a read-only home, where no lease can be written, nor anything be collected.
    """

    def __init__(self, home: Path, digest: str) -> None:
        self._file: IO[str] | None = None
        self._owner = os.getpid()
        folder = home / "leases"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{uuid.uuid4().hex}.json"
            self._file = self._path.open("x")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)
        json.dump({"digest": digest, "process": os.getpid()}, self._file)
        self._file.flush()

    @property
    def effective(self) -> bool:
        """Whether the lease holds anything now."""
        return self._file is not None

    def release(self) -> None:
        """End the lease; again is no error."""
        if self._file is not None:
            # A process forked from the owner has this object too, but not the say.
            if self._owner == os.getpid():
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def leased_digests(home: Path, *, clear: bool = False) -> set[str]:
    """The digests that living processes hold.

    With `clear`, which wants the store held exclusively, the leases of dead processes are cleared away.
    """
    held: set[str] = set()
    for path in (home / "leases").glob("*.json"):
        try:
            with path.open("r+") as file:
                if not _try_lock(file, fcntl.LOCK_EX):
                    held.add(json.load(file)["digest"])
                elif clear:
                    path.unlink(missing_ok=True)
        except (FileNotFoundError, ValueError):
            # Just released, or just being written by one who holds the store.
            continue
    return held


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
