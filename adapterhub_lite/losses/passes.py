"""The two passes over the tiles: statistics (with the hidden gradient where nothing else is trained), and gradients.

Nothing here knows autograd. The target's own logit is computed apart, in the wide dtype, and its term is left out of
the tile sums: a confident token's gradient is then p - 1 without cancellation, even with bf16 products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_lite.losses.options import LossOptions
from adapterhub_lite.losses.rows import RowReader
from adapterhub_lite.losses.tiles import (
    HALF_LIFT,
    Panel,
    TileBuffers,
    exponential_,
    finish_logits,
    product_dtype,
    spans,
    tile_shape,
    wide_dtype,
)


@dataclass(frozen=True)
class Problem:
    """n valid tokens against a head: hidden (n, D), targets (n,), `vocabulary` rows, bias (V,) or None."""

    hidden: Tensor
    targets: Tensor
    vocabulary: int
    bias: Tensor | None
    options: LossOptions


@dataclass(frozen=True)
class Statistics:
    """What the first pass leaves, each (n,) in the wide dtype; `gradient` is (n, D) for an upstream gradient of one.

    `doubt` is 1 - p of the target, summed from the others: near p = 1 the subtraction would leave nothing.
    `pulls` is there where a gradient is made.
    """

    losses: Tensor
    logsumexp: Tensor
    target_logits: Tensor
    doubt: Tensor
    gradient: Tensor | None
    pulls: "Pulls | None" = None


@dataclass(frozen=True)
class Pulls:
    """The gradient of a token's loss by its logits, each (n,): share * exp(logit - largest) for all but the target,
    `own` for the target, and -label_smoothing / V for everyone. A soft cap's slope is in `own`, not in `share`."""

    largest: Tensor
    share: Tensor
    own: Tensor


class _Running:
    """Sums over the vocabulary so far, kept relative to the largest logit so far; the target itself is left out."""

    def __init__(self, tokens: int, columns: int, dtype: torch.dtype, device: torch.device, gradient: bool) -> None:
        self.largest = torch.full((tokens,), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.exponentials = torch.zeros(tokens, dtype=dtype, device=device)
        self.logits = torch.zeros(tokens, dtype=dtype, device=device)
        self.gradient = torch.zeros((tokens, columns), dtype=dtype, device=device) if gradient else None
        self.rows = torch.zeros(columns, dtype=dtype, device=device)


def statistics(problem: Problem, read: RowReader, *, gradient: bool, kept: Panel | None = None) -> Statistics:
    """One pass over the tiles: losses, log-sum-exp and, if asked, the gradient of the hidden states.

    The gradient needs no second pass because it is linear in exp(logit - max) once the sum is known; that holds for
    every option but label smoothing together with a soft cap. `kept`, made for at least as many tokens, is filled
    with the exponentials, for a gradient by the head.
    """
    hidden, targets, options = problem.hidden, problem.targets, problem.options
    wide, device = wide_dtype(hidden.dtype), hidden.device
    hidden = hidden.to(product_dtype(hidden.dtype, device))
    if kept is None:
        shape = tile_shape(len(targets), problem.vocabulary, device, options.chunk_tokens)
        buffers = TileBuffers(shape, hidden.dtype, device)
    else:
        shape, buffers = kept.shape, kept.buffers
        kept.begin(len(targets))
    running = _Running(len(targets), hidden.shape[1], wide, device, gradient)
    target_rows = torch.empty_like(hidden)
    for columns in spans(problem.vocabulary, shape.vocabulary):
        block = read(columns).to(hidden.dtype)
        bias = None if problem.bias is None else problem.bias[columns]
        inside = ((targets >= columns.start) & (targets < columns.stop)).nonzero().squeeze(1)
        target_rows[inside] = block[targets[inside] - columns.start]
        if options.label_smoothing and gradient:
            running.rows += block.sum(0, dtype=wide)
        for part in spans(len(targets), shape.tokens):
            _add_tile(problem, running, buffers, hidden[part], block, bias, part, columns, kept)
    target_bias = None if problem.bias is None else problem.bias[targets]
    target_logits = finish_logits(_row_dots(hidden, target_rows, wide, shape.tokens), target_bias, options)
    return _finish(problem, running, target_rows, target_logits, pulls_wanted=gradient or kept is not None)


def _add_tile(
    problem: Problem,
    running: _Running,
    buffers: TileBuffers,
    hidden: Tensor,
    block: Tensor,
    bias: Tensor | None,
    part: slice,
    columns: slice,
    kept: Panel | None,
) -> None:
    options = problem.options
    tile = buffers.logits(hidden, block, bias, options)
    if options.label_smoothing:
        running.logits[part] += tile.sum(1)
    _set_targets(tile, problem.targets[part], columns, -torch.inf)
    largest = torch.maximum(running.largest[part], tile.amax(1))
    shrink = torch.exp(running.largest[part] - largest)
    running.largest[part] = largest
    used = running.gradient is not None or kept is not None
    slope = _cap_slope(tile, options) if used else None
    exponential_(tile.sub_(largest[:, None]))
    running.exponentials[part] = running.exponentials[part] * shrink + tile.sum(1)
    if not used:
        return
    if slope is not None:
        tile.mul_(slope)
    if buffers.dtype == torch.float16:
        tile.mul_(HALF_LIFT)
    narrow = buffers.narrowed(tile) if kept is None else kept.keep(tile, columns, largest)
    if running.gradient is not None:
        buffers.add_product(running.gradient[part].mul_(shrink[:, None]), narrow, block)


def _finish(
    problem: Problem, running: _Running, target_rows: Tensor, target_logits: Tensor, *, pulls_wanted: bool
) -> Statistics:
    options, others = problem.options, running.exponentials
    smooth = options.label_smoothing
    largest = torch.maximum(running.largest, target_logits)
    shrink = torch.exp(running.largest - largest)
    others = others * shrink
    own = torch.exp(target_logits - largest)
    total = others + own
    logsumexp = largest + total.log()
    losses = (largest - target_logits) + total.log()
    if smooth:
        losses = losses + smooth * (target_logits - (running.logits / problem.vocabulary))
    if options.z_loss:
        losses = losses + options.z_loss * logsumexp.square()
    if not pulls_wanted:
        return Statistics(losses, logsumexp, target_logits, others / total, None)
    factor = 1 + 2 * options.z_loss * logsumexp
    lift = HALF_LIFT if target_rows.dtype == torch.float16 else 1.0
    coefficient = (factor - 1) * own / total - others / total + smooth
    slope = _cap_slope(target_logits, options)
    coefficient = coefficient if slope is None else coefficient * slope
    pulls = Pulls(largest, factor / (total * lift), coefficient)
    gradient = running.gradient
    if gradient is not None:
        gradient.mul_((pulls.share * shrink)[:, None])
        for part in spans(len(gradient), 1024):
            gradient[part].addcmul_(target_rows[part].to(gradient.dtype), coefficient[part, None])
        if smooth:
            gradient.sub_(running.rows * (smooth / problem.vocabulary))
        if options.logit_scale != 1.0:
            gradient.mul_(options.logit_scale)
    return Statistics(losses, logsumexp, target_logits, others / total, gradient, pulls)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the weighted sum of losses: hidden (n, D), rows (V, d) and bias (V,), each None if not asked."""

    hidden: Tensor | None
    rows: Tensor | None
    bias: Tensor | None


def gradients(
    problem: Problem,
    read: RowReader,
    known: Statistics,
    upstream: Tensor,
    *,
    hidden_wanted: bool,
    rows_wanted: tuple[slice, torch.dtype] | None,
    bias_wanted: bool,
) -> Gradients:
    """The second pass: every tile again, weighed by `upstream` (n,) before anything is rounded.

    `rows_wanted` gives the columns of the head that are trained (all of them, or those of a LoRA pair) and the dtype
    of their gradient.
    """
    options, targets = problem.options, problem.targets
    wide, device = wide_dtype(problem.hidden.dtype), problem.hidden.device
    hidden = problem.hidden.to(product_dtype(problem.hidden.dtype, device))
    shape = tile_shape(len(targets), problem.vocabulary, device, options.chunk_tokens)
    buffers = TileBuffers(shape, hidden.dtype, device)
    pulls = _target_pulls(problem, known, upstream)
    found = Gradients(
        torch.zeros(hidden.shape, dtype=wide, device=device) if hidden_wanted else None,
        None if rows_wanted is None else _zero_rows(problem.vocabulary, *rows_wanted, device),
        torch.zeros(problem.vocabulary, dtype=wide, device=device) if bias_wanted else None,
    )
    trained = slice(0, 0) if rows_wanted is None else rows_wanted[0]
    for columns in spans(problem.vocabulary, shape.vocabulary):
        block = read(columns).to(hidden.dtype)
        bias = None if problem.bias is None else problem.bias[columns]
        for_rows = None if found.rows is None else torch.zeros_like(found.rows[columns], dtype=wide)
        for part in spans(len(targets), shape.tokens):
            tile = buffers.logits(hidden[part], block, bias, options)
            _to_gradient(tile, problem, known, upstream, part, columns)
            own = ((targets[part] >= columns.start) & (targets[part] < columns.stop)).nonzero().squeeze(1) + part.start
            local, pull = targets[own] - columns.start, pulls[own]
            narrow = buffers.narrowed(tile)
            if found.bias is not None:
                found.bias[columns].add_(tile.sum(0)).index_add_(0, local, pull)
            if found.hidden is not None:
                buffers.add_product(found.hidden[part], narrow, block)
                found.hidden.index_add_(0, own, block[local] * pull[:, None])
            if for_rows is not None:
                buffers.add_product(for_rows, narrow.t(), hidden[part, trained])
                for_rows.index_add_(0, local, hidden[own, trained] * pull[:, None])
        if for_rows is not None and found.rows is not None:
            found.rows[columns] = for_rows
    return found


def _zero_rows(vocabulary: int, trained: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((vocabulary, trained.stop - trained.start), dtype=dtype, device=device)


def _target_pulls(problem: Problem, known: Statistics, upstream: Tensor) -> Tensor:
    """Gradient (n,) by each target's own product; apart from the tiles, so that p - 1 is not rounded with them."""
    options = problem.options
    smooth = options.label_smoothing
    pulls = smooth - smooth / problem.vocabulary - known.doubt
    if options.z_loss:
        pulls = pulls + 2 * options.z_loss * known.logsumexp * (1 - known.doubt)
    slope = _cap_slope(known.target_logits, options)
    return pulls * upstream * options.logit_scale * (1.0 if slope is None else slope)


def _to_gradient(
    tile: Tensor, problem: Problem, known: Statistics, upstream: Tensor, part: slice, columns: slice
) -> None:
    """Turn a tile of logits into the gradient by hidden @ weight.T + bias, in place; the targets' own entries are 0."""
    options = problem.options
    slope = _cap_slope(tile, options)
    exponential_(tile.sub_(known.logsumexp[part, None]))
    if options.z_loss:
        tile.mul_((1 + 2 * options.z_loss * known.logsumexp[part])[:, None])
    if options.label_smoothing:
        tile.sub_(options.label_smoothing / problem.vocabulary)
    if slope is not None:
        tile.mul_(slope)
    tile.mul_((upstream[part] * options.logit_scale)[:, None])
    _set_targets(tile, problem.targets[part], columns, 0.0)


def _columns_of(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in the block, clamped, and whether it is inside; (t, 1) each. No device to host copy."""
    local = (targets - columns.start)[:, None]
    return local.clamp(0, columns.stop - columns.start - 1), (local >= 0) & (local < columns.stop - columns.start)


def _set_targets(tile: Tensor, targets: Tensor, columns: slice, value: float) -> None:
    """Put `value` where a row's target lies inside the block."""
    column, inside = _columns_of(targets, columns)
    tile.scatter_(1, column, tile.gather(1, column).masked_fill_(inside, value))


def _cap_slope(logits: Tensor, options: LossOptions) -> Tensor | None:
    """Derivative of c * tanh(x / c), from the capped logits; None without a cap. A left-out target gives -inf."""
    if options.softcap is None:
        return None
    return 1 - (logits / options.softcap).clamp(-1, 1).square()


def _row_dots(left: Tensor, right: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Row by row inner products (n,) in `dtype`, without a wide copy of both inputs."""
    dots = [(left[part].to(dtype) * right[part].to(dtype)).sum(1) for part in spans(len(left), step)]
    return torch.cat(dots) if dots else torch.zeros(0, dtype=dtype, device=left.device)
