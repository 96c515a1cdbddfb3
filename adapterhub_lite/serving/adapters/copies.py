"""An adapter's way from host memory to the device, beside the steps that run there.

A plain copy of pageable memory is put among the steps of the engine, and these wait for it. Here it goes through one pinned
buffer of a fixed size, on a stream of its own; whoever loads the adapter waits for its end, and nobody else. So no
adapter is in a slot, where requests find it, before all of it is on the device.
"""

import threading

import torch

from adapterhub_lite.devices import CopyLane, copy_lane
from adapterhub_lite.serving.adapters.weights import AdapterWeights

# Page-locked memory is lost to everything else on the machine.
STAGING_BYTES = 32 << 20


class AdapterCopies:
    """Copies adapters to `device`, one at a time. Thread-safe. `lane` None is for devices that have none: a plain copy."""

    def __init__(self, device: torch.device | str, lane: CopyLane | None) -> None:
        self._device, self._lane = device, lane
        self._lock = threading.Lock()
        self._filled = 0

    @classmethod
    def to(cls, device: torch.device | str) -> "AdapterCopies":
        """By what the device has."""
        return cls(device, copy_lane(torch.device(device), STAGING_BYTES))

    def copied(self, weights: AdapterWeights) -> AdapterWeights:
        """The same load on the device, all of it there.

        Raises:
            Exception: what PyTorch raises where memory is short.
        """
        lane = self._lane
        if lane is None:
            return weights.to(self._device)
        with self._lock:
            try:
                return weights.moved(lambda tensor: self._begin(tensor, lane))
            finally:
                self._wait(lane)

    def _begin(self, source: torch.Tensor, lane: CopyLane) -> torch.Tensor:
        """A tensor of the device that `source` is being copied to."""
        target = lane.empty(source.shape, source.dtype)
        read, write = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (source, target))
        size, at = len(lane.staging), 0
        while at < len(read):
            if self._filled == size:
                self._wait(lane)
            count = min(size - self._filled, len(read) - at)
            staged = lane.staging[self._filled : self._filled + count]
            staged.copy_(read[at : at + count])
            lane.copy(write[at : at + count], staged)
            self._filled += count
            at += count
        return target

    def _wait(self, lane: CopyLane) -> None:
        lane.wait()
        self._filled = 0
