"""Files that several processes share: locks that end with their holder, and stamps that change whenever a file does.

Locks are flock's where the system has it, filelock's elsewhere.

A stamp lets what was read of a file be used again. The time of modification can be set by whoever modifies; size, inode and
the time of change cannot. But before Linux 6.13 the clock of a filesystem moves only every few milliseconds, and on some only
every second or two: a second change within the same tick is not seen. So a stamp counts only once that tick is over (what
git calls a racily clean entry).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, ReadWriteLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.005
# How far a filesystem's clock moves at once: Linux ticks every 10 ms or more often; where a file was changed at a whole
# second, the clock may be one of whole seconds (of two of them on FAT).
FINE_SECONDS, COARSE_SECONDS = 0.02, 2.0

FileStamp = tuple[int, int, int, int]


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


def file_stamp(path: Path) -> FileStamp:
    """Size, inode and the times of modification and change, in nanoseconds, of one file.

    Raises:
        OSError: there is none, or it may not be looked at.
    """
    found = path.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def seconds_to_settle(stamps: Iterable[FileStamp]) -> float:
    """How long a further change of one of the files might still leave its stamp as it is; 0 or less: it would show."""
    newest = max((changed for *_, changed in stamps), default=0)
    tick = FINE_SECONDS if newest % 1_000_000_000 else COARSE_SECONDS
    return newest / 1e9 + tick - time.time()


def settled_stamps(paths: Iterable[Path]) -> tuple[FileStamp, ...] | None:
    """The stamps of `paths`, which any later change of one of them changes; waits for that, a few milliseconds at most as a rule.

    None where a file's time of change lies in the future, or it changes all the time: what is read then holds only for now.

    Raises:
        OSError: as for `file_stamp`.
    """
    paths = list(paths)
    for _ in range(4):
        stamps = tuple(file_stamp(path) for path in paths)
        missing = seconds_to_settle(stamps)
        if missing <= 0:
            return stamps
        if missing > COARSE_SECONDS:
            return None
        time.sleep(missing)
    return None
