"""The adapters an engine can answer with: resolved, brought up through the tiers, held while in use.

Tiers, nearest first: resident (a slot beside the base), host memory, disk (the registry), hub. Knows references and
memory; nothing of requests, rows or threads of the engine.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch

from adapterhub_lite.adapter_format.changes import Structure
from adapterhub_lite.errors import (
    ConfigurationError,
    QueueFullError,
    RequestTimeoutError,
    ResourceError,
)
from adapterhub_lite.serving.adapters.copies import AdapterCopies
from adapterhub_lite.serving.adapters.finding import AdapterFinder, FoundAdapters
from adapterhub_lite.serving.adapters.slots import AdapterSlots, HostTier, ResidentAdapter, SlotRequest
from adapterhub_lite.serving.adapters.sources import AdapterFiles, AdapterSource
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Family, Part, Parts, read_adapter_weights

Tier = Literal["resident", "host", "disk"]
# How long a caller waits for an adapter slot when the request has no time-out of its own.
SLOT_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Route:
    """What a request is answered with: the parts for its row, their names and digests, and how to let go of them."""

    parts: Parts = ()
    name: str | None = None
    digest: str | None = None
    seconds: float = 0.0
    release: Callable[[], None] = lambda: None
    end_tokens: frozenset[int] | None = None


class AdapterPool:
    """Adapters by reference for one base. Thread-safe; loading happens in the threads of those who ask."""

    def __init__(
        self,
        source: AdapterSource,
        families: tuple[Family, ...],
        base_fingerprint: str,
        *,
        device: torch.device | str,
        max_slots: int,
        max_host: int,
        max_rank: int,
        structure: Structure | None = None,
        free: Callable[[], int] | None = None,
    ) -> None:
        self.finder = AdapterFinder(source, base_fingerprint)
        self._structure = structure
        self._free = free
        self.slots = AdapterSlots[AdapterWeights](max_slots)
        self._families = families
        self._copies = AdapterCopies.to(device)
        self._max_rank = max_rank
        self._host = HostTier(max_host)
        # A version in memory can be asked for again, so it stays in the store until its last copy here is gone.
        self._holds: WeakSet[AbstractContextManager[Any]] = WeakSet()
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="adapterhub-prefetch")

    def route(self, adapter: str | Path | None, timeout: float | None = None) -> Route:
        """Resolve an adapter argument, and hold what it names in memory until the route is released.

        Raises:
            RequestTimeoutError, QueueFullError: no slot came free in `timeout` seconds, or in a minute.
        """
        return self.hold(self.finder.find(adapter), timeout)

    def hold(self, found: FoundAdapters, timeout: float | None = None) -> Route:
        """Hold what was found in memory until the route is released.

        Raises:
            RequestTimeoutError, QueueFullError: no slot came free in `timeout` seconds, or in a minute.
        """
        if not found.files:
            return Route()
        started = time.perf_counter()
        wanted = [self._wanted(files) for files in found.files]
        try:
            entries, _ = self.slots.acquire(wanted, timeout=min(timeout or SLOT_WAIT_SECONDS, SLOT_WAIT_SECONDS))
        except QueueFullError as error:
            if timeout is not None and time.perf_counter() - started >= timeout:
                raise RequestTimeoutError(f"No adapter slot came free within the request's {timeout} s.") from error
            raise
        held = list(entries)

        def release() -> None:
            while held:
                self.slots.release(held.pop())

        alone = len(found.pieces) == 1 and found.pieces[0].weight == 1.0
        whole = [entry.name for entry in entries if entry.weights and not entry.weights.adds_up]
        if whole and not alone:
            release()
            raise ConfigurationError(
                f"{whole[0]} puts something in place of the base's own (a DoRA's lengths, whole modules or rows of tokens), "
                "of which no share can be added to others. Ask for it alone, at its full weight."
            )
        factors = ["" if alone else piece.factor for piece in found.pieces]
        return Route(
            tuple(Part(e.weights, piece.weight) for e, piece in zip(entries, found.pieces, strict=True) if e.weights),
            "+".join(entry.name + factor for entry, factor in zip(entries, factors, strict=True)),
            "+".join(entry.digest + factor for entry, factor in zip(entries, factors, strict=True)),
            found.seconds + time.perf_counter() - started,
            release,
            found.end_tokens(),
        )

    def load(self, reference: str | Path, *, pin: bool = False) -> ResidentAdapter:
        """Bring an adapter into a slot; `pin` keeps it there."""
        (entry,), _ = self.slots.acquire([self._wanted(self.finder.locate(reference))], timeout=SLOT_WAIT_SECONDS)
        if pin:
            self.slots.pin(entry.digest, True)
        return self.slots.release(entry)

    def prefetch(self, reference: str | Path) -> "Future[ResidentAdapter]":
        """Do `load` in the background, one after another."""
        return self._prefetcher.submit(self.load, reference)

    def unload(self, reference: str | Path, *, timeout: float | None = None) -> bool:
        """Take an adapter out of its slot and of host memory once nobody uses it; False when it was in no slot."""
        digest = self.finder.locate(reference).digest
        self._host.drop(digest)
        return self.slots.unload(digest, timeout=timeout)

    def tier(self, reference: str | Path) -> Tier:
        """Say how near an adapter is."""
        digest = self.finder.locate(reference).digest
        return "resident" if digest in self.slots else "host" if digest in self._host else "disk"

    @property
    def damaged(self) -> int:
        """How often bytes were not the recorded ones, on disk or in host memory; they were never answered with."""
        return self.finder.damaged + self._host.damaged

    def close(self) -> None:
        """Stop prefetching, and let the store have what was held."""
        self._prefetcher.shutdown(wait=False, cancel_futures=True)
        self._host.close()
        for hold in list(self._holds):
            hold.__exit__(None, None, None)

    def _grant(self, files: AdapterFiles) -> None:
        """Refuse an adapter that memory is too short for: a saved head may be as large as gigabytes."""
        if self._free is None or not files.weights.is_file():
            return  # reading it says what is wrong
        size, free = files.weights.stat().st_size, self._free()
        if 2 * size > free:
            raise ResourceError(
                f"{files.name} takes {size:,} bytes, twice that while it is loaded, and {free:,} are free. Unload other "
                "adapters, or try again later."
            )

    def _wanted(self, files: AdapterFiles) -> SlotRequest[AdapterWeights]:
        def load() -> AdapterWeights:
            weights = self._host.get(files.digest)
            if weights is None:
                self._grant(files)
                hold = files.hold()
                self._holds.add(hold)
                with self.finder.counting_damage():
                    weights = read_adapter_weights(
                        files.weights,
                        self._families,
                        files.scaling_of,
                        max_rank=self._max_rank,
                        subject=files.name,
                        sha256=files.sha256,
                        config=files.config,
                        structure=self._structure,
                    )
                weights = replace(weights, hold=hold)
                self._host.put(files.digest, weights)
            return self._copies.copied(weights)

        return SlotRequest(files.digest, files.name, load)
