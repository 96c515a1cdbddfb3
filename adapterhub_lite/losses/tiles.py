"""One tile of logits at a time: its size, its buffers, its products. Knows torch only.

A tile is (tokens, vocabulary). The vocabulary is the outer loop, so that a block of the head is read, gathered or
dequantised once a pass whatever the number of tokens. Buffers are allocated once a pass and reused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_lite.losses.options import LossOptions

# Measured with scripts/bench/train/loss.py --tiles: below these the products are too small to be fast, above them the tile
# leaves the cache. Those of the accelerators are set by memory alone: 200 MB of tile buffers.
CPU_TOKENS, CPU_ELEMENTS = 1024, 2**21
LEAST_VOCABULARY = 512
ACCELERATOR_TOKENS, ACCELERATOR_ELEMENTS = 4096, 2**25

# Exponentials kept from one pass to the next where the head is trained: 128 MB in bf16 on a CPU, 256 MB elsewhere.
CPU_PANEL, ACCELERATOR_PANEL = 2**26, 2**27

# Keeps exp(logit - max) in fp16 range: below 2 ** -24 it would be lost, and it is never above 1.
HALF_LIFT = 2.0**14


@dataclass(frozen=True)
class TileShape:
    """How many tokens and how many rows of the head are handled at once."""

    tokens: int
    vocabulary: int


def tile_shape(tokens: int, vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> TileShape:
    """Choose the tile of a problem with `tokens` valid tokens; `chunk_tokens` fixes its first side."""
    on_cpu = device.type == "cpu"
    limit, elements = (CPU_TOKENS, CPU_ELEMENTS) if on_cpu else (ACCELERATOR_TOKENS, ACCELERATOR_ELEMENTS)
    rows = max(1, min(tokens, chunk_tokens or limit))
    return TileShape(rows, max(1, min(vocabulary, _even(max(LEAST_VOCABULARY, elements // rows)))))


def _even(side: int) -> int:
    """Round down to whole vector registers, where there is anything to round."""
    return side - side % 64 if side >= 64 else side


def panel_shape(tokens: int, vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> TileShape:
    """As `tile_shape`, with so few tokens that their exponentials over the whole vocabulary can be kept."""
    elements = CPU_PANEL if device.type == "cpu" else ACCELERATOR_PANEL
    most = _even(max(1, elements // vocabulary))
    return tile_shape(tokens, vocabulary, device, min(most, chunk_tokens or most))


def spans(length: int, step: int) -> Iterator[slice]:
    """Cut range(length) into slices of `step`, the last one shorter."""
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype the products take. CPU products of fp16 come back in fp16, which overflows: they are done in fp32."""
    return torch.float32 if dtype == torch.float16 and device.type != "cuda" else dtype


class TileBuffers:
    """Buffers of one pass, each seen as (tokens, vocabulary) or (tokens, D) of the tile at hand."""

    def __init__(self, shape: TileShape, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.narrow_products = dtype != wide_dtype(dtype) and device.type != "cuda"
        size = shape.tokens * shape.vocabulary
        self._wide = torch.empty(size, dtype=wide_dtype(dtype), device=device)
        self._narrow = torch.empty(size if dtype != wide_dtype(dtype) else 0, dtype=dtype, device=device)
        self._partial = torch.empty(0, dtype=dtype, device=device)
        self._wide_partial = torch.empty(0, dtype=self._wide.dtype, device=device)

    def logits(self, hidden: Tensor, block: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
        """Scaled, soft-capped logits (t, v) in the wide dtype. The buffer is overwritten by the next call."""
        shape = hidden.shape[0], block.shape[0]
        logits = self._wide[: shape[0] * shape[1]].view(shape)
        if self.narrow_products:
            logits.copy_(torch.mm(hidden, block.t(), out=self._narrow[: logits.numel()].view(shape)))
        elif self.dtype == logits.dtype:
            torch.mm(hidden, block.t(), out=logits)
        else:
            torch.mm(hidden, block.t(), out_dtype=logits.dtype, out=logits)
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
            # Both buffers are kept: a sum of unlike dtypes would make a new one each time, page by page.
            if self._partial.numel() < total.numel():
                self._partial = torch.empty(total.numel(), dtype=self.dtype, device=self.device)
                self._wide_partial = torch.empty(total.numel(), dtype=total.dtype, device=self.device)
            product = torch.mm(left, right, out=self._partial[: total.numel()].view(total.shape))
            total.add_(self._wide_partial[: total.numel()].view(total.shape).copy_(product))


class Panel:
    """The exponentials of some tokens over the whole vocabulary, block by block, in the dtype of the products.

    With them the head's gradient needs no second product of hidden states and head. Made once, filled again and again.
    """

    def __init__(self, shape: TileShape, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.buffers = shape, TileBuffers(shape, dtype, device)
        self._store = torch.empty(shape.tokens * vocabulary, dtype=dtype, device=device)
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Forget what is kept; the next blocks have `tokens` rows."""
        self._tokens = tokens
        self.blocks: list[tuple[slice, Tensor, Tensor]] = []

    def keep(self, exponentials: Tensor, columns: slice, largest: Tensor) -> Tensor:
        """Copy a tile (t, v), made relative to `largest` (t,), and return the copy."""
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


def exponential_(exponents: Tensor) -> Tensor:
    """exp in place, for exponents of at most about 0. Below e ** -80 all is one: results that are denormal numbers take
    a processor a hundred times as long (31 ns instead of 0.3, measured on a CPU with MKL), and none of them counts."""
    return exponents.clamp_(min=-700.0 if exponents.dtype == torch.float64 else -80.0).exp_()
