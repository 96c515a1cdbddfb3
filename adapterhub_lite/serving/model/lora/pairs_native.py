"""A bank that copies nothing: rows point at the adapters' weights where they lie, and compiled code adds the deltas.

For a CPU with a C compiler. The same interface as `TorchLora`, which is what it is held against. Putting a task into a
row is writing down where it is; adapters of any rank and dtype stand side by side unpadded, and rows of one adapter
read the same memory.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch

from adapterhub_lite.serving.adapters.weights import Family, FamilyWeights, Parts
from adapterhub_lite.serving.model.packed_step import Step

# As in compiled/row_products.h, KINDS as in compiled/lanes.h.
ENTRY = struct.Struct("@PPPPiiiiif")
BLOCK = struct.Struct("@iiii")
BLOCK_TOKENS = 4
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Layout:
    """What one group's calls of a step are given: entries and blocks as C reads them."""

    def __init__(self, entries: bytes, blocks: bytes, widest: int) -> None:
        # Held here, so that the memory stays while C may read it.
        self._entries = ctypes.create_string_buffer(entries, len(entries))
        self._blocks = ctypes.create_string_buffer(blocks, len(blocks))
        self.count = len(blocks) // BLOCK.size
        self.pointers = (ctypes.addressof(self._entries), ctypes.addressof(self._blocks), self.count)
        self.widest = widest


class NativeLora:
    """Routes rows to adapters by address. `products` is `native.row_products()`."""

    def __init__(
        self,
        groups: Sequence[Sequence[Family]],
        rows: int,
        products: Callable[..., None],
        *,
        threads: int | None = None,
    ) -> None:
        self._groups = groups
        self._products = products
        self._threads = threads
        self._rows: list[Parts] = [()] * rows
        self._layouts: list[_Layout | None] = [None] * len(groups)
        self._laid_out: tuple[tuple[int, int, int], ...] | None = None
        self._indices: dict[int, ctypes.Array[ctypes.c_int32]] = {}
        self._calls = 1

    def place(self, row: int, parts: Parts) -> None:
        """Route `row` to the sum of `parts`; no parts is the base."""
        self._rows[row] = parts
        self._laid_out = None

    def leave(self, row: int) -> None:
        """Let go of the weights of a row."""
        self.place(row, ())

    def shrink(self) -> None:
        """Nothing is held beyond the rows in use."""

    def begin(self, step: Step) -> None:
        """Lay out the routing of a step for all its layers; kept while the rows compute as many tokens each."""
        self._calls = self._threads or torch.get_num_threads()
        shape = tuple((run.rows.start, run.query_length, run.count) for run in step.runs)
        if shape != self._laid_out:
            self._indices = {}
            self._layouts = [self._lay_out(step, group) for group in self._groups]
            self._laid_out = shape

    def add(self, group: int, layer: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add each row's own delta to y in place, from x (T, in); return y (T, the outs of the group side by side)."""
        layout = self._layouts[group]
        if layout is not None:
            assert x.dtype == y.dtype and x.stride(1) == y.stride(1) == 1
            self._products(
                *layout.pointers, layer, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), KINDS[x.dtype],
                x.shape[1], y.shape[1], layout.widest, self._calls,
            )  # fmt: skip
        return y

    def routing(self, group: int) -> tuple[int, int, int, int]:
        """Of a group in this step: addresses of entries and blocks, the number of blocks, the largest rank."""
        layout = self._layouts[group]
        return (0, 0, 0, 0) if layout is None else (*layout.pointers, layout.widest)

    def _lay_out(self, step: Step, group: Sequence[Family]) -> _Layout | None:
        entries, blocks, widest = b"", b"", 1
        for run in step.runs:
            for at, row in enumerate(range(run.rows.start, run.rows.stop)):
                mine = self._entries(self._rows[row], group)
                if not mine:
                    continue
                first = len(entries) // ENTRY.size
                entries += b"".join(packed for packed, _ in mine)
                widest = max(widest, *(rank for _, rank in mine))
                begin = run.tokens.start + at * run.query_length
                for token in range(begin, begin + run.query_length, BLOCK_TOKENS):
                    count = min(BLOCK_TOKENS, begin + run.query_length - token)
                    blocks += BLOCK.pack(token, count, first, len(mine))
        return _Layout(entries, blocks, widest) if blocks else None

    def _entries(self, parts: Parts, group: Sequence[Family]) -> list[tuple[bytes, int]]:
        """The packed entries of a row for a group, those of one family together, each with its rank."""
        found, column = [], 0
        for family in group:
            for part in parts:
                pair = part.weights.families.get(family.name)
                if pair is not None:
                    a, b, rank = pair.a, pair.b, pair.a.shape[1]
                    assert a.dtype == b.dtype, "the entry names one dtype for both"
                    packed = ENTRY.pack(
                        a.data_ptr(), b.data_ptr(), pair.scale.data_ptr(), self._index(pair, len(family.paths)),
                        rank, family.in_features, family.out_features, column, KINDS[a.dtype], part.factor,
                    )  # fmt: skip
                    found.append((packed, rank))
            column += family.out_features
        return found

    def _index(self, pair: FamilyWeights, layers: int) -> int:
        """Address of where each layer stands in the pair's tensors, 0 when all are there in order."""
        if len(pair.layers) == layers:
            return 0
        places = [pair.layers.index(layer) if layer in pair.layers else -1 for layer in range(layers)]
        index = (ctypes.c_int32 * layers)(*places)
        self._indices[ctypes.addressof(index)] = index
        return ctypes.addressof(index)
