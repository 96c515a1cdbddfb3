"""How long what people wait for took the last time, so that a waiting page can say so. Remembered while the server runs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Kinds that are remembered; a person can name any number of data sets.
MOST_KINDS = 100
# What is done sooner is not worth a word.
SECONDS_WORTH_SAYING = 1.0


class Durations:
    """Seconds of the last time that each kind of work was done without an error. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Remember how long the block takes, if it succeeds."""
        began = time.monotonic()
        yield
        with self._lock:
            self._seconds.pop(kind, None)
            self._seconds[kind] = time.monotonic() - began
            while len(self._seconds) > MOST_KINDS:
                del self._seconds[next(iter(self._seconds))]

    def last(self, kind: str) -> float | None:
        """Seconds of the last time; None before the first."""
        with self._lock:
            return self._seconds.get(kind)

    def is_quick(self, kind: str) -> bool:
        """Whether the last time was over before anybody would have read what is being done."""
        seconds = self.last(kind)
        return seconds is not None and seconds < SECONDS_WORTH_SAYING

    def waiting(self, kind: str, doing: str) -> str:
        """What a page says meanwhile: `doing`, and how long it took the last time."""
        seconds = self.last(kind)
        return f"{doing}…" if seconds is None else f"{doing}… ({time_words(seconds)} the last time)"


def time_words(seconds: float) -> str:
    """So many seconds as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
