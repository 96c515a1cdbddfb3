"""Locks on files that end with the process that holds them: flock where the system has it, filelock's elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, ReadWriteLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.005


@contextmanager
def lock_file(path: Path, *, exclusive: bool, seconds: float) -> Iterator[None]:
    """Hold `path` while the block runs: together with others that share it, or alone.

    Not re-entrant: a thread that holds it exclusively and asks again waits for itself.

    Raises:
        TimeoutError: it was not free within so many seconds.
    """
    if fcntl is None:
        with _without_flock(path, exclusive, seconds):
            yield
        return
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with path.open("a") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is held by others") from None
                time.sleep(POLL_SECONDS)
        yield


def claim(file: IO[str], *, wait: bool = False) -> Callable[[], None] | None:
    """Lock an open file for this process alone; returns what releases it.

    Where another process has it: None, or with `wait` once that has released it.
    """
    if fcntl is None:
        beside = Path(f"{file.name}.lock")
        lock = FileLock(beside)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return None

        def release() -> None:
            file.close()
            lock.release()
            beside.unlink(missing_ok=True)

        return release
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return file.close


@contextmanager
def _without_flock(path: Path, exclusive: bool, seconds: float) -> Iterator[None]:
    # An instance for each use: one instance keeps its threads from waiting for each other.
    lock = ReadWriteLock(path.with_suffix(".lock.db"), is_singleton=False)
    hold = lock.write_lock if exclusive else lock.read_lock
    try:
        with hold(timeout=seconds):
            yield
    except Timeout as error:
        raise TimeoutError(f"{path} is held by others") from error
    finally:
        lock.close()
