"""Attention of rows with few queries in compiled code (row_attention.c), over keys and values where they lie in the cache.

For a CPU with a C compiler; what it computes is what `KVCache.look` does without.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch

from adapterhub_lite.serving.model.cache.looks import Look
from adapterhub_lite.serving.model.lora.pairs_native import KINDS

# As in attention.h.
LOOK = struct.Struct("@iiii")
HEADS_AT_ONCE = 4
# A row that computes more tokens at once is a prompt being read: PyTorch's matrix products are the faster ones then.
MOST_QUERIES = 8


class _Tensors(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "out_token", "key_place", "value_place")),
        *((name, ctypes.c_int32) for name in ("kind", "io_kind", "heads", "kv_heads", "key_dim", "value_dim")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class NativeAttention:
    """Attends for the runs of a step that have few queries a row. `kernel` is `native.row_attention()`."""

    def __init__(self, kernel: Callable[..., None], *, threads: int | None = None) -> None:
        self._kernel = kernel
        self._threads = threads
        self._taken: list[Look] = []
        self._looks: dict[int | None, tuple[ctypes.Array[ctypes.c_char], int]] = {}
        self._scores = torch.empty(0)
        self._room = 0

    def begin(self, looks: Sequence[Look]) -> list[Look]:
        """Take those of a step that are for this code; return the others."""
        self._taken = [look for look in looks if look.run.query_length <= MOST_QUERIES]
        self._looks = {}
        self._room = max((look.run.kv_length for look in self._taken), default=0)
        self._calls = self._threads or torch.get_num_threads()
        needed = self._calls * HEADS_AT_ONCE * self._room
        if self._scores.numel() < needed:
            self._scores = torch.empty(2 * needed)
        return [look for look in looks if look.run.query_length > MOST_QUERIES]

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        """Write the results of what was taken into out (T, heads, value_dim), from query (T, heads, head_dim).

        `keys` and `values` are a layer's (places, kv_heads, head_dim), those of this step included.
        """
        if not self._taken:
            return
        looks, count = self._looks.get(window) or self._look(window)
        assert query.dtype == keys.dtype == out.dtype and query.stride(2) == 1
        strides = (*query.stride()[:2], out.stride(0), keys.stride(0), values.stride(0))
        tensors = _Tensors(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            *(stride * query.element_size() for stride in strides), KINDS[query.dtype], KINDS[query.dtype],
            query.shape[1], keys.shape[1], query.shape[2], values.shape[2],
            query.shape[2] ** -0.5 if scaling is None else scaling, 0.0,
        )  # fmt: skip
        self._kernel(
            ctypes.addressof(tensors), ctypes.addressof(looks), count, self._scores.data_ptr(), self._room, self._calls
        )

    def _look(self, window: int | None) -> tuple["ctypes.Array[ctypes.c_char]", int]:
        """For each token: itself, where its row begins, and the first and the end of the row's places that it sees."""
        packed = []
        for look in self._taken:
            run = look.run
            for at, start in enumerate(run.starts):
                begin = look.begin + at * look.spacing
                for query in range(run.query_length):
                    end = start + query + 1
                    token = run.tokens.start + at * run.query_length + query
                    packed.append(LOOK.pack(token, begin, 0 if window is None else max(0, end - window), end))
        made = ctypes.create_string_buffer(b"".join(packed), len(packed) * LOOK.size), len(packed)
        self._looks[window] = made
        return made
