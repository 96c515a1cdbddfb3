"""How large the pieces of the loss are, and what they take: the losses allocate by it, the memory estimate counts by it.

The logits (N, V) of a loss are computed in tiles of (tokens, vocabulary). Where the head is trained, the exponentials of a
panel, which is some tokens over the whole vocabulary, are kept as well. Devices are named by torch's type: "cpu", "cuda".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileLimits:
    """The most that one tile and one panel hold, in elements (`logits`, `panel`) and along the sides of a tile."""

    tokens: int
    logits: int
    panel: int
    least_vocabulary: int = 512


# Measured with scripts/bench/train/loss.py --tiles: below these sizes of a tile the products are too small to be fast, above
# them the tile leaves the cache. Those of an accelerator are set by memory alone: 200 MB of tile buffers. A panel takes
# 128 MB in bf16 on a CPU, 256 MB elsewhere.
LIMITS = {
    "cpu": TileLimits(tokens=1024, logits=2**21, panel=2**26),
    "accelerator": TileLimits(tokens=4096, logits=2**25, panel=2**27),
}


@dataclass(frozen=True)
class TileShape:
    """How many tokens and how many rows of the head are handled at once."""

    tokens: int
    vocabulary: int


def limits_of(device: str) -> TileLimits:
    """The limits on a device of this type."""
    return LIMITS["cpu" if device == "cpu" else "accelerator"]


def tile_shape(tokens: int, vocabulary: int, device: str, chunk_tokens: int | None = None) -> TileShape:
    """Choose the tile of a problem with `tokens` valid tokens; `chunk_tokens` fixes its first side."""
    limits = limits_of(device)
    rows = max(1, min(tokens, chunk_tokens or limits.tokens))
    columns = _whole_registers(max(limits.least_vocabulary, limits.logits // rows))
    return TileShape(rows, max(1, min(vocabulary, columns)))


def panel_shape(tokens: int, vocabulary: int, device: str, chunk_tokens: int | None = None) -> TileShape:
    """As `tile_shape`, with so few tokens that their exponentials over the whole vocabulary can be kept."""
    most = _whole_registers(max(1, limits_of(device).panel // vocabulary))
    return tile_shape(tokens, vocabulary, device, min(most, chunk_tokens or most))


def _whole_registers(side: int) -> int:
    """Round down to whole vector registers, where there is anything to round."""
    return side - side % 64 if side >= 64 else side


@dataclass(frozen=True)
class LossSize:
    """The numbers that the loss's memory depends on: (tokens, columns) states of `item_bytes` against (vocabulary, columns)."""

    tokens: int
    vocabulary: int
    columns: int
    item_bytes: int
    device: str


def frozen_head_bytes(size: LossSize) -> int:
    """Bytes at the worst moment with a frozen head: one tile of logits, and the valid states with their gradients.

    The sums of a tile are in fp32, and its products in the dtype of the states where that is narrower. Of the states there
    are the valid ones, their targets' rows and the gradient as it is handed on; the gradient is summed in fp32.
    """
    logits = min(size.tokens * size.vocabulary, limits_of(size.device).logits)
    return logits * (4 + size.item_bytes % 4) + size.tokens * size.columns * (4 + 3 * size.item_bytes)


def trained_head_bytes(size: LossSize) -> int:
    """What a trained head adds: its gradient in fp32, and the larger of a panel and that gradient as it is handed on."""
    rows = size.vocabulary * size.columns
    panel = min(size.tokens * size.vocabulary, limits_of(size.device).panel)
    return rows * 4 + max(panel, rows) * size.item_bytes
