"""Which adapters are in memory: loaded once, counted while in use, the least recently used out first.

Two tiers. A slot is memory on the device, where requests use it; what lost its slot stays in host memory for a while.
Looking up and counting is one atomic step, so nothing is freed between the two. Each load has a fresh id.
Knows nothing of requests, rows or the model.
"""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving.adapters.weights import AdapterWeights, next_load_id


class Loaded(Protocol):
    """An adapter that an engine has loaded, wherever it lies."""

    @property
    def load_id(self) -> int:
        """Fresh for each load."""
        ...

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        ...

    @property
    def modules(self) -> int:
        """How many modules of the base it changes."""
        ...

    @property
    def nbytes(self) -> int:
        """The memory it takes, in bytes."""
        ...

    @property
    def extras(self) -> Sequence[object]:
        """What it changes more than a row of a batch can have."""
        ...


W = TypeVar("W", bound=Loaded)


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter in memory as seen from outside. `load_id` is fresh for each load; `uses` counts running requests.

    `apart` says that its rows are computed in steps of their own: it changes more than a row of a batch can have.
    """

    name: str
    digest: str
    load_id: int
    rank: int
    modules: int
    nbytes: int
    uses: int
    pinned: bool
    apart: bool = False


@dataclass(eq=False)
class Slot(Generic[W]):
    """One load of one adapter. Only `AdapterSlots` changes it."""

    digest: str
    name: str
    weights: W | None = None
    error: BaseException | None = None
    uses: int = 0
    pinned: bool = False
    last_used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class SlotRequest(Generic[W]):
    """An adapter that somebody wants in memory, and how to load it."""

    digest: str
    name: str
    load: Callable[[], W]


class AdapterSlots(Generic[W]):
    """At most `count` adapters in memory. Thread-safe. `loads` and `evictions` count since the start.

    `gone` is called with the digest of each adapter that lost its slot to another, without a lock, before that one is
    loaded.
    """

    def __init__(self, count: int, *, gone: Callable[[str], None] = lambda digest: None) -> None:
        self._count, self._gone = count, gone
        self._evicted: list[str] = []
        self._changed = threading.Condition()
        self._held: dict[str, Slot[W]] = {}
        self._leaving: list[Slot[W]] = []
        self.loads = 0
        self.evictions = 0

    def acquire(self, wanted: Sequence[SlotRequest[W]], *, timeout: float | None = None) -> tuple[list[Slot[W]], bool]:
        """Return a slot for each of `wanted`, counted as in use, and whether all were there already.

        What is missing is loaded, by one caller for all who want it. All slots are taken in one step or none, so that
        two blends never wait for each other. Waits while slots are in use. Every caller must `release` each slot.

        Raises:
            QueueFullError: the slots did not come free within `timeout` seconds, or never can.
            AdapterHubError: whatever a load raises, for everybody who waited for it.
        """
        distinct = {one.digest: one for one in wanted}
        with self._changed:
            self._take_room(distinct, timeout)
            mine = []
            for digest, one in distinct.items():
                if digest not in self._held:
                    mine.append(digest)
                    self._held[digest] = Slot(digest, one.name)
            slots = [self._held[one.digest] for one in wanted]
            for slot in slots:
                slot.uses += 1
                slot.last_used = time.monotonic()
            evicted, self._evicted = self._evicted, []
        try:
            for digest in evicted:
                self._gone(digest)
            for slot in {one.digest: one for one in slots if one.digest in mine}.values():
                weights = distinct[slot.digest].load()
                with self._changed:
                    slot.weights = weights
                    self.loads += 1
                    self._changed.notify_all()
            for slot in slots:
                self._await(slot)
        except BaseException:
            self._abandon(slots, mine)
            raise
        return slots, not mine

    def release(self, slot: Slot[W]) -> ResidentAdapter:
        """Count one use less, and say what the slot is then."""
        with self._changed:
            slot.uses -= 1
            assert slot.uses >= 0, "released more often than acquired"
            self._changed.notify_all()
            assert slot.weights is not None
            return _view(slot, slot.weights)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter in memory whatever happens, or stop keeping it."""
        with self._changed:
            if digest in self._held:
                self._held[digest].pinned = pinned
                self._changed.notify_all()

    def unload(self, digest: str, *, timeout: float | None = None) -> bool:
        """Forget `digest` at once, wait until nobody uses it, and free it; False when it was not there.

        Requests that hold it finish on it; new ones load it afresh. After `timeout` seconds it stays until they end.
        """
        with self._changed:
            slot = self._held.pop(digest, None)
            if slot is None:
                return False
            self._leaving.append(slot)
            self._changed.notify_all()
            self._changed.wait_for(lambda: slot.uses == 0, timeout)
            self._sweep()
            return True

    def __contains__(self, digest: str) -> bool:
        with self._changed:
            return digest in self._held

    def resident(self) -> list[ResidentAdapter]:
        """Say what is in memory now, in order of last use."""
        with self._changed:
            ready = [slot for slot in self._held.values() if slot.weights is not None]
            return [_view(slot, slot.weights) for slot in sorted(ready, key=lambda e: e.last_used) if slot.weights]

    def _take_room(self, distinct: Mapping[str, SlotRequest[W]], timeout: float | None) -> None:
        """Wait until the missing ones fit, and evict what has to go for them. Holds the lock."""
        if len(distinct) > self._count:
            raise QueueFullError(f"The blend needs {len(distinct)} adapter slots, there are {self._count}.")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._make_room(distinct):
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or not self._changed.wait(left):
                raise QueueFullError(f"All {self._count} adapter slots are in use; try again later.")

    def _make_room(self, distinct: Mapping[str, SlotRequest[W]]) -> bool:
        self._sweep()
        missing = len(distinct.keys() - self._held.keys())
        excess = missing + len(self._held) + len(self._leaving) - self._count
        if missing == 0 or excess <= 0:
            return True
        spare = [slot for slot in self._held.values() if not slot.pinned and slot.digest not in distinct]
        if excess > len(spare) + len(self._leaving):
            raise QueueFullError(f"Too few of the {self._count} adapter slots are left by pins; unpin some.")
        idle = sorted((slot for slot in spare if slot.uses == 0), key=lambda slot: slot.last_used)
        if len(idle) < excess:
            return False
        for slot in idle[:excess]:
            del self._held[slot.digest]
            self._evicted.append(slot.digest)
            self.evictions += 1
        return True

    def _await(self, slot: Slot[W]) -> None:
        """Wait until whoever loads a slot has done so, or failed."""
        with self._changed:
            self._changed.wait_for(lambda: slot.weights is not None or slot.error is not None)
            if slot.error is not None:
                raise slot.error

    def _abandon(self, slots: Sequence[Slot[W]], mine: Sequence[str]) -> None:
        """Undo an acquisition that failed: what this caller was to load and did not is nobody's any more."""
        error = sys.exception()
        with self._changed:
            for slot in slots:
                slot.uses -= 1
                if slot.weights is None and slot.digest in mine:
                    slot.error = error
                    if self._held.get(slot.digest) is slot:
                        del self._held[slot.digest]
            self._changed.notify_all()

    def _sweep(self) -> None:
        self._leaving = [slot for slot in self._leaving if slot.uses > 0]


def _view(slot: Slot[W], weights: W) -> ResidentAdapter:
    return ResidentAdapter(
        slot.name,
        slot.digest,
        weights.load_id,
        weights.rank,
        weights.modules,
        weights.nbytes,
        slot.uses,
        slot.pinned,
        bool(weights.extras),
    )


class HostTier:
    """At most `capacity` adapters by digest, the least recently used goes first. Thread-safe.

    Each is kept with a checksum; what does not have it any more when it is taken out is forgotten, and counted in
    `damaged`.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[AdapterWeights, Future[int]]] = OrderedDict()
        # Whoever puts something in does not wait for its checksum.
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="adapterhub-checksum")
        self.damaged = 0

    def put(self, digest: str, weights: AdapterWeights) -> None:
        """Keep weights, and let the oldest go."""
        with self._lock:
            self._held[digest] = (weights, self._summing.submit(weights.checksum))
            self._held.move_to_end(digest)
            while len(self._held) > self._capacity:
                self._held.popitem(last=False)

    def get(self, digest: str) -> AdapterWeights | None:
        """Return what is kept, under a fresh load id, or None."""
        with self._lock:
            found = self._held.get(digest)
            if found is None:
                return None
            self._held.move_to_end(digest)
        weights, checksum = found
        if weights.checksum() != checksum.result():
            self.damaged += 1
            self.drop(digest)
            return None
        return replace(weights, load_id=next_load_id())

    def drop(self, digest: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._held.pop(digest, None)

    def close(self) -> None:
        """Let the thread end."""
        self._summing.shutdown(wait=False)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._held
