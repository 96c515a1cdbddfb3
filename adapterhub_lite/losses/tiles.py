"""One tile of logits at a time: its buffers and its products. Knows torch only.

A tile is (tokens, vocabulary). The vocabulary is the outer loop, so that a block of the head is read, gathered or
dequantised once per pass, whatever the number of tokens. Buffers are allocated once per pass and reused.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from adapterhub_lite import devices
from adapterhub_lite.loss_sizes import TileShape
from adapterhub_lite.losses.reference import LossOptions

HALF_LIFT = 2.0**14
"""The factor on exponentials that are rounded to fp16; see the formulas in `passes`."""


def spans(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into slices of `step`, the last one shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype the products take. CPU products of fp16 come back in fp16, which overflows: they are done in fp32."""
    return torch.float32 if dtype == torch.float16 and not devices.multiplies_into_fp32(device) else dtype


class TileBuffers:
    """Buffers of one pass, each seen as (tokens, vocabulary) or (tokens, D) of the current tile."""

    def __init__(self, shape: TileShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.narrow_products = dtype != wide_dtype(dtype) and not devices.multiplies_into_fp32(device)
        self._wide = torch.empty(0, dtype=wide_dtype(dtype), device=device)
        self._narrow = torch.empty(0, dtype=dtype, device=device)
        self._partial = torch.empty(0, dtype=dtype, device=device)
        self._wide_partial = torch.empty(0, dtype=self._wide.dtype, device=device)

    def _allocate(self) -> None:
        size = self.shape.tokens * self.shape.vocabulary
        self._wide = self._wide.new_empty(size)
        if self._narrow.dtype != self._wide.dtype:
            self._narrow = self._narrow.new_empty(size)

    def logits(self, hidden: Tensor, rows: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
        """Scaled, soft-capped logits (t, v) in the wide dtype. The buffer is overwritten by the next call."""
        shape = hidden.shape[0], rows.shape[0]
        if not self._wide.numel():
            self._allocate()
        logits = self._wide[: shape[0] * shape[1]].view(shape)
        if self.narrow_products:
            logits.copy_(torch.mm(hidden, rows.t(), out=self._narrow[: logits.numel()].view(shape)))
        elif self.dtype == logits.dtype:
            torch.mm(hidden, rows.t(), out=logits)
        else:
            torch.mm(hidden, rows.t(), out_dtype=logits.dtype, out=logits)
        return finish_logits(logits, bias, options)

    def narrowed(self, gradient: Tensor) -> Tensor:
        """`gradient` (t, v) in the dtype of the products."""
        if gradient.dtype == self.dtype:
            return gradient
        return self._narrow[: gradient.numel()].view(gradient.shape).copy_(gradient)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left @ right, the sum kept in the dtype of `total`."""
        if self.dtype == total.dtype:
            total.addmm_(left, right)
        elif not self.narrow_products:
            total.add_(torch.mm(left, right, out_dtype=total.dtype))
        else:
            # Both buffers are kept: a sum of unlike dtypes would allocate a new one each time, page by page.
            if self._partial.numel() < total.numel():
                self._partial = torch.empty(total.numel(), dtype=self.dtype, device=self.device)
                self._wide_partial = torch.empty(total.numel(), dtype=total.dtype, device=self.device)
            product = torch.mm(left, right, out=self._partial[: total.numel()].view(total.shape))
            total.add_(self._wide_partial[: total.numel()].view(total.shape).copy_(product))


class Panel:
    """The exponentials of some tokens over the whole vocabulary, block by block, in the dtype of the products.

    With them the head's gradient needs no second product of hidden states and head. Allocated once, filled repeatedly.
    """

    def __init__(self, buffers: TileBuffers, vocabulary: int) -> None:
        self.buffers = buffers
        self._store = torch.empty(buffers.shape.tokens * vocabulary, dtype=buffers.dtype, device=buffers.device)
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Forget the blocks; the next ones have `tokens` rows."""
        self._tokens = tokens
        self.blocks: list[tuple[slice, Tensor, Tensor]] = []

    def keep(self, exponentials: Tensor, columns: slice, largest: Tensor) -> Tensor:
        """Copy a tile (t, v), computed relative to `largest` (t,), and return the copy."""
        start = columns.start * self._tokens
        block = self._store[start : start + exponentials.numel()].view(exponentials.shape).copy_(exponentials)
        self.blocks.append((columns, block, largest))
        return block


def finish_logits(products: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    """Bias, scale and soft cap, in place, in this order."""
    if bias is not None:
        products.add_(bias)
    if options.logit_scale != 1.0:
        products.mul_(options.logit_scale)
    if options.softcap is not None:
        products.div_(options.softcap).tanh_().mul_(options.softcap)
    return products


def cap_slope(logits: Tensor, options: LossOptions) -> Tensor | None:
    """Derivative of c * tanh(x / c), from the capped logits; None without a cap. An excluded target is -inf: slope 0."""
    if options.softcap is None:
        return None
    return 1 - (logits / options.softcap).clamp(-1, 1).square()


def exponential_(exponents: Tensor) -> Tensor:
    """exp in place, for exponents of at most about 0.

    All below e ** -80 become e ** -80: denormal results take a processor a hundred times as long (31 ns instead of 0.3,
    measured on a CPU with MKL), and none of them counts.
    """
    return exponents.clamp_(min=-700.0 if exponents.dtype == torch.float64 else -80.0).exp_()


def set_targets(tile: Tensor, targets: Tensor, columns: slice, value: float) -> None:
    """Put `value` where a row's target lies inside the block; without a copy from device to host."""
    local = (targets - columns.start)[:, None]
    width = columns.stop - columns.start
    column, inside = local.clamp(0, width - 1), (local >= 0) & (local < width)
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside, value))
