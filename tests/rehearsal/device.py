"""A device that is not the CPU, without a GPU: real numbers, the device's name, and a look at every operation.

`install()` registers torch's `privateuse1` backend in Python under the name "rehearsal". Its tensors are a subclass that
holds a tensor of the CPU; a dispatch mode sees every operation below autograd, so forward and backward pass alike:

- a mix of devices is refused as CUDA refuses it (only a CPU scalar of no dimensions may join in);
- whatever needs the values on the CPU (`item`, `.cpu()`, a shape that depends on numbers) is counted as a sync, with the
  line of ours that asked for it;
- what reads the memory behind torch's back (numpy, `data_ptr`, ctypes) finds none.

Registering cannot be undone, and changes what torch calls the accelerator: it is for a process of its own. Chosen over fake
tensors on "cuda", whose backward pass needs a driver, and over torch's `openreg`, which is C++ to build and whose memory
is the CPU's, so that ctypes would find it.
"""

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "rehearsal"
aten = torch.ops.aten
# Operations that wait for the device wherever they run, since the CPU has to know a number of theirs.
SYNCS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.bincount.default, aten.repeat_interleave.Tensor, aten.argwhere.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default, aten._copy_from.default}


class RehearsalTensor(torch.Tensor):
    """A tensor that says it is on the device; `held` is the CPU's tensor with its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "RehearsalTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None)

    @property
    def data(self) -> torch.Tensor:
        """As torch's; what is assigned must be on the device too."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, RehearsalTensor):
            raise RuntimeError(f"data of a tensor on {NAME}:0 cannot be one on {value.device}")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def tolist(self) -> Any:
        """The numbers, copied to the CPU where the mode sees it."""
        return self.cpu().tolist()

    def storage(self) -> Any:
        """For those who save, and ask which tensors share their memory."""
        return self.held.storage()

    def untyped_storage(self) -> Any:
        """As `storage`."""
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds the CPU's tensor; who loads it says where it belongs."""
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"RehearsalTensor({self.held})"


class Rehearsal(TorchDispatchMode):
    """Sees every operation while it lasts; `syncs` counts those that wait for the device, by operation and line."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return run(func, args, kwargs or {}, self)

    def note(self, what: str) -> None:
        """Count a sync under the innermost line of the package."""
        lines = [frame for frame in traceback.extract_stack() if "/adapterhub_lite/" in frame.filename]
        where = f"{lines[-1].filename.split('/adapterhub_lite/')[-1]}:{lines[-1].name}" if lines else "elsewhere"
        self.syncs[what, where] += 1

    @contextmanager
    def no_syncs(self) -> Iterator[None]:
        """Refuse syncs inside.

        Raises:
            AssertionError: there were some; names operation and line.
        """
        before = Counter(self.syncs)
        yield
        found = self.syncs - before
        assert not found, f"the CPU waits for the device: {dict(found)}"


def run(func: Any, args: Any, kwargs: dict[str, Any], mode: Rehearsal | None) -> Any:
    """Run an operation on the CPU's tensors, for the device that its tensors or its arguments name."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    ours = [leaf for leaf in tensors if isinstance(leaf, RehearsalTensor)]
    # A composite operation that arrives whole has the device among its other arguments.
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    named = devices[0].type if devices else None
    if not ours and named != NAME:
        return func(*args, **kwargs)
    others = [leaf for leaf in tensors if not isinstance(leaf, RehearsalTensor) and leaf.device.type == "cpu"]
    crossing = func in COPIES or func.overloadpacket is aten.to
    if ours and not crossing:
        mixed = [leaf for leaf in others if leaf.dim() > 0]
        if func in INDEXING:
            # CUDA takes indices of the CPU, and copies them.
            mixed = [leaf for leaf in mixed if leaf is args[0]]
        if mixed:
            shapes = [tuple(leaf.shape) for leaf in mixed]
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {NAME}:0 and cpu {shapes}")
    if mode is not None and ours:
        note_syncs(func, args, named, mode)
    to_cpu = crossing and (named == "cpu" or (func is aten.copy_.default and not isinstance(args[0], RehearsalTensor)))
    plain_args, plain_kwargs = pytree.tree_map(plain, (args, kwargs))
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if to_cpu or func is aten._local_scalar_dense.default:
        return args[0] if func is aten.copy_.default else out
    known = {id(leaf.held): leaf for leaf in ours}

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else RehearsalTensor(leaf)

    result = pytree.tree_map(wrapped, out)
    for leaf in ours:
        refresh(leaf)
    return result


def plain(leaf: Any) -> Any:
    """What an argument is on the CPU."""
    if isinstance(leaf, RehearsalTensor):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def refresh(leaf: RehearsalTensor) -> None:
    """Operations such as `resize_` or `set_` change a tensor's shape in place; those are not rehearsed."""
    assert leaf.shape == leaf.held.shape, "an operation changed a shape in place"


def note_syncs(func: Any, args: Any, named: str | None, mode: Rehearsal) -> None:
    """Count what waits for the device."""
    moves = func is aten._to_copy.default or func.overloadpacket is aten.to
    if func in SYNCS:
        mode.note(str(func))
    elif func in INDEXING and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        mode.note(f"{func} by a mask")
    elif (moves and named == "cpu") or (func is aten.copy_.default and not isinstance(args[0], RehearsalTensor)):
        mode.note("copy to the CPU")


class Module:
    """What stands at `torch.rehearsal`: what CUDA's module has, as far as it is asked for."""

    def is_available(self) -> bool:
        """Always."""
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        """The only one."""
        return 0

    def device_count(self) -> int:
        """One."""
        return 1

    def device(self, _index: int) -> Any:
        """A block on a device."""
        return nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: random numbers are the CPU's."""

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        """The CPU's."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        """The CPU's."""
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """As CUDA."""
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        """16 GiB, all of it free."""
        return 1 << 34, 1 << 34

    def max_memory_allocated(self, *_: Any) -> int:
        """Not counted."""
        return 1

    def reset_peak_memory_stats(self, *_: Any) -> None:
        """Not counted."""

    def empty_cache(self) -> None:
        """There is none."""

    def synchronize(self, *_: Any) -> None:
        """Nothing waits."""

    def get_device_name(self, *_: Any) -> str:
        """Its name."""
        return "a rehearsal"


def unseen_bias(kind: type[torch.Tensor], *_: Any) -> torch.Tensor:
    """An empty bias, made outside of every mode."""
    with _disable_current_modes():
        return torch.Tensor.__new__(kind)


def install() -> Rehearsal:
    """Register the device; returns the mode, not yet entered."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    # `torch.tensor(..., device=...)` then makes the CPU's tensor first and copies it, where the mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    mode, begin = Rehearsal(), threading.Thread.run

    def run_rehearsed(thread: threading.Thread) -> None:
        # Both are a thread's own.
        torch._C._set_only_lift_cpu_tensors(True)
        with mode:
            begin(thread)

    threading.Thread.run = run_rehearsed  # type: ignore[method-assign]
    # torch makes a bias from an empty tensor, and cannot where a mode looks on.
    CausalBias.__new__ = staticmethod(unseen_bias)  # type: ignore[method-assign]
    # Tensors of inference have no version counter, and a subclass cannot view them.
    torch.inference_mode = lambda mode=True: torch.no_grad()
    return mode
