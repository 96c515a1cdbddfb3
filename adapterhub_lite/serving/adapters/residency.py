"""Which adapters are in memory: loaded once, counted while in use, least recently used out first.

Looking up and counting is one atomic step, so nothing is freed between the two. Each load has a fresh id.
Knows nothing of requests, rows or the model.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving.adapters.weights import AdapterWeights


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


@dataclass(frozen=True)
class Wanted:
    """An adapter that somebody wants in memory, and how to load it."""

    digest: str
    name: str
    load: Callable[[], AdapterWeights]


class Residency:
    """At most `slots` adapters in memory. Thread-safe. `loads` and `evictions` count since the start."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._leaving: list[Entry] = []
        self.loads = 0
        self.evictions = 0

    def acquire(self, wanted: Sequence[Wanted], *, timeout: float | None = None) -> tuple[list[Entry], bool]:
        """Return an entry for each of `wanted`, counted as in use, and whether all were there already.

        What is missing is loaded, by one caller for all who want it. All slots are taken in one step or none, so that
        two blends never wait for each other. Waits while slots are in use. Every caller must `release` each entry.

        Raises:
            QueueFullError: the slots did not come free within `timeout` seconds, or never can.
            AdapterHubError: whatever a load raises, for everybody who waited for it.
        """
        distinct = {one.digest: one for one in wanted}
        with self._changed:
            self._take_room(distinct, timeout)
            mine = []
            for digest, one in distinct.items():
                if digest not in self._entries:
                    mine.append(digest)
                    self._entries[digest] = Entry(digest, one.name)
            entries = [self._entries[one.digest] for one in wanted]
            for entry in entries:
                entry.uses += 1
                entry.last_used = time.monotonic()
        try:
            for entry in {e.digest: e for e in entries if e.digest in mine}.values():
                self._load(entry, distinct[entry.digest].load)
            for entry in entries:
                self._await_load(entry)
        except BaseException:
            self._abandon(entries, mine)
            raise
        return entries, not mine

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

    def __contains__(self, digest: str) -> bool:
        with self._changed:
            return digest in self._entries

    def resident(self) -> list[ResidentAdapter]:
        """Say what is in memory now, in order of last use."""
        with self._changed:
            ready = [entry for entry in self._entries.values() if entry.weights is not None]
            return [_view(entry, entry.weights) for entry in sorted(ready, key=lambda e: e.last_used) if entry.weights]

    def _take_room(self, distinct: Mapping[str, Wanted], timeout: float | None) -> None:
        """Wait until the missing ones fit, and evict what has to go for them. Holds the lock."""
        if len(distinct) > self._slots:
            raise QueueFullError(f"The blend needs {len(distinct)} adapter slots, there are {self._slots}.")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._make_room(distinct):
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not self._changed.wait(left):
                raise QueueFullError(f"All {self._slots} adapter slots are in use; try again later.")

    def _make_room(self, distinct: Mapping[str, Wanted]) -> bool:
        self._sweep()
        missing = len(distinct.keys() - self._entries.keys())
        excess = missing + len(self._entries) + len(self._leaving) - self._slots
        if missing == 0 or excess <= 0:
            return True
        spare = [entry for entry in self._entries.values() if not entry.pinned and entry.digest not in distinct]
        if excess > len(spare) + len(self._leaving):
            raise QueueFullError(f"Too few of the {self._slots} adapter slots are left by pins; unpin some.")
        idle = sorted((entry for entry in spare if entry.uses == 0), key=lambda entry: entry.last_used)
        if len(idle) < excess:
            return False
        for entry in idle[:excess]:
            del self._entries[entry.digest]
            self.evictions += 1
        return True

    def _load(self, entry: Entry, load: Callable[[], AdapterWeights]) -> None:
        weights = load()
        with self._changed:
            entry.weights = weights
            self.loads += 1
            self._changed.notify_all()

    def _await_load(self, entry: Entry) -> None:
        with self._changed:
            self._changed.wait_for(lambda: entry.weights is not None or entry.error is not None)
            if entry.error is not None:
                raise entry.error

    def _abandon(self, entries: Sequence[Entry], mine: Sequence[str]) -> None:
        """Undo an acquisition that failed: what this caller was to load and did not is nobody's any more."""
        error = sys.exception()
        with self._changed:
            for entry in entries:
                entry.uses -= 1
                if entry.weights is None and entry.digest in mine:
                    entry.error = error
                    if self._entries.get(entry.digest) is entry:
                        del self._entries[entry.digest]
            self._changed.notify_all()

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
