"""low_rank.c on tensors: the products of an adapter of low rank with bf16 activations, on a CPU with a C compiler.

torch asks oneDNN for them, which makes code for each number of tokens and keeps it, as for products of any size; and it
rounds each to bf16, where these add up in fp32. The plain products are the reference.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from adapterhub_lite.memory.stand_ins import MOST_COMPILED_RANK
from adapterhub_lite.native import load_compiled

SOURCE = Path(__file__).with_suffix(".c")


class LowRank:
    """The compiled functions: x (tokens, n) in bf16, `matrix` (rank, n) and `left` (tokens, rank) in fp32, contiguous."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        for name in ("reduce", "update", "gradient"):
            count = ctypes.c_long
            getattr(library, name).argtypes = [
                *[ctypes.c_void_p] * 3,
                count,
                count,
                count,
                ctypes.c_float,
                ctypes.c_int,
            ]
        self._library = library

    def reduce(self, x: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
        """scale * x matrix^T (tokens, rank), in fp32."""
        left = x.new_empty((len(x), len(matrix)), dtype=torch.float32)
        self._library.reduce(*_pointers(x, matrix, left), *_sizes(x, matrix), scale, torch.get_num_threads())
        return left

    def update(self, x: Tensor, matrix: Tensor, left: Tensor, scale: float = 1.0) -> None:
        """Add scale * left matrix to x, rounded once."""
        self._library.update(*_pointers(x, matrix, left), *_sizes(x, matrix), scale, torch.get_num_threads())

    def gradient(self, x: Tensor, left: Tensor, scale: float = 1.0) -> Tensor:
        """scale * left^T x (rank, n), in fp32."""
        matrix = x.new_empty((left.shape[1], x.shape[1]), dtype=torch.float32)
        self._library.gradient(*_pointers(x, left, matrix), *_sizes(x, matrix), scale, torch.get_num_threads())
        return matrix


@functools.cache
def _low_rank() -> LowRank | None:
    library = load_compiled([SOURCE])
    return LowRank(library) if library is not None else None


def low_rank_for(x: Tensor, rank: int) -> LowRank | None:
    """The compiled functions where they can take `x` (tokens, n) and are worth it for adapters of `rank`; else None."""
    able = x.device.type == "cpu" and x.dtype == torch.bfloat16 and rank <= MOST_COMPILED_RANK
    # What is traced or faked has no numbers to point at.
    if not able or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return None
    return _low_rank()


def _pointers(*tensors: Tensor) -> list[int]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]


def _sizes(x: Tensor, matrix: Tensor) -> tuple[int, int, int]:
    return len(x), x.shape[1], len(matrix)
