"""Which adapters are in memory: loaded once, counted while in use, least recently used out first.

Looking up and counting is one atomic step, so nothing is freed between the two. Each load has a fresh id.
Knows nothing of requests, rows or the model.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving.weights import AdapterWeights


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter in memory as seen from outside. `load_id` is fresh for each load; `uses` counts running requests."""

    name: str
    digest: str
    load_id: int
    rank: int
    modules: int
    nbytes: int
    uses: int
    pinned: bool


@dataclass(eq=False)
class Entry:
    """One load of one adapter. Only `Residency` changes it."""

    digest: str
    name: str
    weights: AdapterWeights | None = None
    error: BaseException | None = None
    uses: int = 0
    pinned: bool = False
    last_used: float = field(default_factory=time.monotonic)


class Residency:
    """At most `slots` adapters in memory. Thread-safe."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._leaving: list[Entry] = []

    def acquire(
        self, digest: str, name: str, load: Callable[[], AdapterWeights], *, timeout: float | None = None
    ) -> tuple[Entry, bool]:
        """Return the entry of `digest`, counted as in use, and whether it was there already; load it where it is not.

        Waits while all slots are in use. Every caller must `release` it.

        Raises:
            QueueFullError: no slot came free within `timeout` seconds.
            AdapterHubError: whatever `load` raises, for everybody who waited for that load.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            entry = self._entries.get(digest)
            while entry is None and not self._make_room():
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not self._changed.wait(left):
                    raise QueueFullError(f"All {self._slots} adapter slots are in use or pinned; try again later.")
                entry = self._entries.get(digest)
            fresh = entry is None
            if entry is None:
                entry = self._entries[digest] = Entry(digest, name)
            entry.uses += 1
            entry.last_used = time.monotonic()
            if not fresh:
                self._await_load(entry)
                return entry, True
        self._load(entry, load)
        return entry, False

    def release(self, entry: Entry) -> ResidentAdapter:
        """Count one use less, and say what the entry is then."""
        with self._changed:
            entry.uses -= 1
            assert entry.uses >= 0, "released more often than acquired"
            self._changed.notify_all()
            assert entry.weights is not None
            return _view(entry, entry.weights)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter in memory whatever happens, or stop keeping it."""
        with self._changed:
            if digest in self._entries:
                self._entries[digest].pinned = pinned
                self._changed.notify_all()

    def unload(self, digest: str, *, timeout: float | None = None) -> bool:
        """Forget `digest` at once, wait until nobody uses it, and free it; False when it was not there.

        Requests that hold it finish on it; new ones load it afresh. After `timeout` seconds it stays until they end.
        """
        with self._changed:
            entry = self._entries.pop(digest, None)
            if entry is None:
                return False
            self._leaving.append(entry)
            self._changed.notify_all()
            self._changed.wait_for(lambda: entry.uses == 0, timeout)
            self._sweep()
            return True

    def resident(self) -> list[ResidentAdapter]:
        """Say what is in memory now, in order of last use."""
        with self._changed:
            ready = [entry for entry in self._entries.values() if entry.weights is not None]
            return [_view(entry, entry.weights) for entry in sorted(ready, key=lambda e: e.last_used) if entry.weights]

    def _await_load(self, entry: Entry) -> None:
        self._changed.wait_for(lambda: entry.weights is not None or entry.error is not None)
        if entry.error is not None:
            entry.uses -= 1
            raise entry.error

    def _load(self, entry: Entry, load: Callable[[], AdapterWeights]) -> None:
        try:
            weights = load()
        except BaseException as error:
            with self._changed:
                entry.error = error
                entry.uses -= 1
                if self._entries.get(entry.digest) is entry:
                    del self._entries[entry.digest]
                self._changed.notify_all()
            raise
        with self._changed:
            entry.weights = weights
            self._changed.notify_all()

    def _make_room(self) -> bool:
        self._sweep()
        if len(self._entries) + len(self._leaving) < self._slots:
            return True
        idle = [entry for entry in self._entries.values() if entry.uses == 0 and not entry.pinned]
        if not idle:
            return False
        oldest = min(idle, key=lambda entry: entry.last_used)
        del self._entries[oldest.digest]
        return len(self._entries) + len(self._leaving) < self._slots

    def _sweep(self) -> None:
        self._leaving = [entry for entry in self._leaving if entry.uses > 0]


def _view(entry: Entry, weights: AdapterWeights) -> ResidentAdapter:
    return ResidentAdapter(
        entry.name,
        entry.digest,
        weights.load_id,
        weights.rank,
        weights.modules,
        weights.nbytes,
        entry.uses,
        entry.pinned,
    )
