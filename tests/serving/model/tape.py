"""A recorder of a device's work that needs no GPU: a tape of operations, run again on the same memory.

What a CUDA graph is to Python, this is too: nothing of the recorded call runs again but its operations, with the numbers and
shapes that they were given then, on the tensors that they were given then. What would wait for the device, or copy
from the CPU, is refused while recording, as CUDA refuses it. Of memory that was there before, a tape is no owner, as a graph
is none: where it has been given back, replaying fails.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Runs and keeps every operation while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        devices = {leaf.device.type for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} over {sorted(devices)}")
        out = func(*args, **kwargs)
        self.calls.append((func, *pytree.tree_map(self._borrowed, (args, kwargs)), out))
        self._made |= {id(leaf) for leaf in pytree.tree_leaves(out)}  # held by `calls`, so that no other has the id
        return out

    def _borrowed(self, leaf: Any) -> Any:
        foreign = isinstance(leaf, torch.Tensor) and id(leaf) not in self._made
        return weakref.ref(leaf) if foreign else leaf

    def replay(self) -> None:
        """Run every operation again; what it made then is overwritten with what it makes now."""
        for func, *given, then in self.calls:
            args, kwargs = pytree.tree_map(there, given)
            now = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(then), pytree.tree_leaves(now), strict=True):
                if isinstance(old, torch.Tensor) and not shares_memory(old, new):
                    old.copy_(new)


def there(leaf: Any) -> Any:
    """What was borrowed.

    Raises:
        AssertionError: it is not there any more.
    """
    if not isinstance(leaf, weakref.ref):
        return leaf
    found = leaf()
    assert found is not None, "a recorded step reads memory that was given back"
    return found


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class TapeRecorder:
    """`devices.Recorder` by tapes."""

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """As the protocol says."""
        call()
        with Tape() as tape:
            out = call()
        return out, tape.replay
