"""What the passes of a loss are given and give: a problem, blocks of its head, gradients. Knows torch only."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapterhub_lite.loss_sizes import tile_shape
from adapterhub_lite.losses.reference import LossOptions
from adapterhub_lite.losses.rows import RowReader
from adapterhub_lite.losses.tiles import TileBuffers, spans, wide_dtype


@dataclass(frozen=True)
class Block:
    """Some rows of the head: `columns` of the vocabulary, their weight (v, D), and their bias (v,) or None."""

    columns: slice
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Problem:
    """n valid tokens against a head: hidden (n, D) in the dtype of the products, targets (n,), V rows, bias (V,).

    With `triton` the tiles are computed by the kernels of `triton_tiles`."""

    hidden: Tensor
    targets: Tensor
    read: RowReader
    vocabulary: int
    bias: Tensor | None
    options: LossOptions
    triton: bool = False

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, losses and gradients."""
        return wide_dtype(self.hidden.dtype)

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.hidden.device

    def blocks(self, step: int) -> Iterator[Block]:
        """The head in blocks of `step` rows, read once each."""
        for columns in spans(self.vocabulary, step):
            yield Block(
                columns,
                self.read(columns).to(self.hidden.dtype),
                None if self.bias is None else self.bias[columns],
            )

    def buffers(self) -> TileBuffers:
        """Buffers for one pass over all tokens."""
        shape = tile_shape(len(self.targets), self.vocabulary, self.device.type, self.options.chunk_tokens)
        return TileBuffers(shape, self.hidden.dtype, self.device)

    @cached_property
    def _by_target(self) -> tuple[Tensor, list[int]]:
        """The tokens in the order of their targets, and those targets. The only wait for the device in a pass: asking
        each block of the head for its targets would be one per block."""
        order = self.targets.argsort(stable=True)
        return order, self.targets[order].tolist()

    def tokens_of(self, columns: slice) -> Tensor:
        """Which tokens have their target among these rows of the head."""
        order, ascending = self._by_target
        return order[bisect_left(ascending, columns.start) : bisect_left(ascending, columns.stop)]

    def zeros(self, *shape: int) -> Tensor:
        """A sum that begins."""
        return torch.zeros(shape, dtype=self.wide, device=self.device)


@dataclass(frozen=True)
class TokenStatistics:
    """What the second pass needs of the first, each (n,) in the wide dtype; `one_minus_p` is 1 - p of the target."""

    logsumexp: Tensor
    target_logits: Tensor
    one_minus_p: Tensor


@dataclass(frozen=True)
class Wanted:
    """Which gradients are computed. `columns` of the head's rows: all of them, those of a LoRA pair, or None."""

    hidden: bool
    columns: slice | None
    bias: bool


@dataclass(frozen=True)
class Gradients:
    """Gradients of the weighted sum of losses: hidden (n, D), rows (V, d) and bias (V,), each None if not asked for."""

    hidden: Tensor | None
    rows: Tensor | None
    bias: Tensor | None
