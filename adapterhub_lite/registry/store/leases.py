"""Who is using what now: leases of running servers, and pulls that are under way. The kernel ends both with the process.

Each is a lock on a file under a home folder, so a process that is killed leaves nothing that counts.
"""

import errno
import fcntl
import json
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO

# Where pulls put what they fetch, one folder each, until it is complete; and the file whose lock a pull into a folder
# holds: that folder's name and this.
PULLS = "hub"
PULL_LOCK = ".lock"


class Lease:
    """A running server's statement that it uses an adapter. It ends with `release`, with its `with` block, with the last
    reference to it, or with the process.

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
            # A process forked from the owner has this object too, but may not end the lease.
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

    With `clear`, for which the caller must hold the store exclusively, leases of dead processes are deleted.
    """
    held: set[str] = set()
    for path in (home / "leases").glob("*.json"):
        try:
            with path.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.add(json.load(file)["digest"])
                    continue
                if clear:
                    path.unlink(missing_ok=True)
        except (FileNotFoundError, ValueError):
            # Just released, or just being written by one who holds the store.
            continue
    return held
