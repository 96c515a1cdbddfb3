"""lean_blocks.c on tensors: the elementwise parts of a layer's step in one pass each, on a CPU with a C compiler.

Every function here has a plain one in torch that it is compared with: those of `lean_modules` and `lean_attention`.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapterhub_lite.native import load_compiled

SOURCE = Path(__file__).with_suffix(".c")
# So that roots and comparisons are vectors; neither changes a number.
FLAGS = ("-fno-math-errno", "-fno-trapping-math")
DTYPES = (torch.float32, torch.bfloat16)


class _Layout(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("segments", "length", "heads", "kv_heads", "head_width", "rotated", "stride")
    )


@dataclass(frozen=True)
class Heads:
    """How heads lie in a row of tokens, and how many segments of which length they are laid out in; see lean_blocks.c."""

    segments: int
    length: int
    heads: int
    kv_heads: int
    width: int


class LeanBlocks:
    """The compiled functions. Tensors are contiguous, on a CPU, in fp32 or bf16 as `DTYPES` has them."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        pointer, number, count, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
        library.norm_forward.argtypes = [*[pointer] * 4, count, count, real, number, number, number]
        library.norm_backward.argtypes = [*[pointer] * 5, count, count, number, number]
        library.gate_forward.argtypes = [*[pointer] * 3, count, count, count, number, number, number]
        library.gate_backward.argtypes = [*[pointer] * 5, count, count, count, number, number, number]
        for name in ("fold", "unfold"):
            getattr(library, name).argtypes = [*[pointer] * 6, number, number]
        library.causal_softmax.argtypes = [pointer, count, count, count, real, number]
        library.softmax_backward.argtypes = [pointer, pointer, count, count, real, number]
        self._library = library

    def norm(self, x: Tensor, factor: Tensor, epsilon: float, *, once: bool) -> tuple[Tensor, Tensor]:
        """(factor * x / rms(x), 1 / rms(x) in fp32) of x (..., D); factor (D,) in fp32; rounded `once` or before it too."""
        out, scale = passing(x.shape, x.dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._library.norm_forward(
            *_pointers(x, factor, out, scale), scale.numel(), x.shape[-1], epsilon, once, *_how(x)
        )
        return out, scale

    def norm_backward(self, grad: Tensor, x: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
        """The gradient of x, where that of the result is `grad`."""
        out = torch.empty_like(x)
        self._library.norm_backward(*_pointers(grad, x, factor, scale, out), scale.numel(), x.shape[-1], *_how(x))
        return out

    def gate(self, gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
        """act(gate) * up of (tokens, width), both with the same stride from row to row."""
        out = passing(gate.shape, gate.dtype)
        self._library.gate_forward(*_pointers(gate, up, out), *gate.shape, gate.stride(0), gelu, *_how(gate))
        return out

    def gate_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor, to_gate: Tensor, to_up: Tensor, *, gelu: bool
    ) -> None:
        """Write the gradients of both, which lie as they do."""
        self._library.gate_backward(
            *_pointers(grad, gate, up, to_gate, to_up), *gate.shape, gate.stride(0), gelu, *_how(gate)
        )

    def fold(self, x: Tensor, cosine: Tensor, sine: Tensor, places: Tensor, heads: Heads) -> Tensor:
        """x (tokens, heads * width) turned, in fp32, as (segments * kv heads, heads of each * length, width)."""
        shape = heads.segments * heads.kv_heads, heads.heads // heads.kv_heads * heads.length, heads.width
        out = passing(shape, torch.float32)
        layout = _layout(x, cosine, heads)
        self._library.fold(*_pointers(x, cosine, sine, places, out), ctypes.addressof(layout), *_how(x))
        return out

    def unfold(self, x: Tensor, cosine: Tensor, sine: Tensor, places: Tensor, heads: Heads, out: Tensor) -> None:
        """The transpose of `fold`, written into `out` (tokens, heads * width)."""
        assert x.dtype == torch.float32
        layout = _layout(out, cosine, heads)
        self._library.unfold(*_pointers(x, cosine, sine, places, out), ctypes.addressof(layout), *_how(out))

    def softmax(self, scores: Tensor, window: int | None, scaling: float) -> Tensor:
        """The causal softmax of scaled scores (batch, n * length, length), in their place."""
        assert scores.dtype == torch.float32
        rows, length = scores.shape[0] * scores.shape[1], scores.shape[2]
        self._library.causal_softmax(
            *_pointers(scores), rows, length, window or length, scaling, torch.get_num_threads()
        )
        return scores

    def softmax_backward(self, weights: Tensor, grad: Tensor, scaling: float) -> Tensor:
        """The gradient of the scores, in the place of `grad`, that of the weights."""
        assert weights.dtype == grad.dtype == torch.float32
        rows, length = weights.shape[0] * weights.shape[1], weights.shape[2]
        self._library.softmax_backward(*_pointers(weights, grad), rows, length, scaling, torch.get_num_threads())
        return grad


def passing(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the CPU for what is freed while tensors made after it are kept for the backward pass.

    A little room behind it lets one of these have its place: before 2.38 glibc gives none that is aligned a hole of just its
    size, and the heap of a step was a third holes.
    """
    return torch.empty(math.prod(shape) + 128, dtype=dtype).resize_(*shape)


@functools.cache
def lean_blocks() -> LeanBlocks | None:
    """The compiled functions, made at the first call in a process (about a second); None without a C compiler."""
    library = load_compiled([SOURCE], *FLAGS)
    return LeanBlocks(library) if library is not None else None


def blocks_for(*tensors: Tensor) -> LeanBlocks | None:
    """The compiled functions where they can take `tensors`, which have to be of one dtype; else None."""
    first = tensors[0]
    able = first.device.type == "cpu" and first.dtype in DTYPES and all(t.dtype == first.dtype for t in tensors)
    # What is traced or faked has no numbers to point at.
    if not able or torch.compiler.is_compiling() or type(first) not in (Tensor, torch.nn.Parameter):
        return None
    return lean_blocks()


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _how(x: Tensor) -> tuple[int, int]:
    return int(x.dtype == torch.bfloat16), torch.get_num_threads()


def _layout(x: Tensor, cosine: Tensor, heads: Heads) -> _Layout:
    assert x.stride(-1) == 1
    rotated = cosine.shape[-1]
    return _Layout(heads.segments, heads.length, heads.heads, heads.kv_heads, heads.width, rotated, x.stride(0))
