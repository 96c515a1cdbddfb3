"""The tier between disk and the device: weights of adapters that lost their slot, kept in host memory for a while."""

import threading
from collections import OrderedDict
from dataclasses import replace

from adapterhub_lite.serving.adapters.weights import AdapterWeights, next_load_id


class HostTier:
    """At most `capacity` adapters by digest, the least recently used goes first. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._held: OrderedDict[str, AdapterWeights] = OrderedDict()

    def put(self, digest: str, weights: AdapterWeights) -> None:
        """Keep weights, and let the oldest go."""
        with self._lock:
            self._held[digest] = weights
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
        return replace(found, load_id=next_load_id())

    def drop(self, digest: str) -> None:
        """Forget an adapter."""
        with self._lock:
            self._held.pop(digest, None)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._held
