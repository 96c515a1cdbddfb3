"""The mathematics of the loss, and the passes over tiles of logits that compute it. Knows torch, nothing of autograd.

For one token with hidden state h and target y, over the vocabulary j = 1..V:

    z_j  = w_j . h + b_j                              raw logit
    x_j  = s z_j                                      logit scale s (Cohere, Granite, Falcon-H1)
    l_j  = c tanh(x_j / c)                            soft cap c (Gemma 2, arXiv:2408.00118); l = x without one
    lse  = log sum_j exp(l_j),  p_j = exp(l_j - lse)
    loss = lse - (1 - e) l_y - (e / V) sum_j l_j      label smoothing e (arXiv:1512.00567)
           + q lse^2                                  z-loss q (PaLM, arXiv:2204.02311)

    dloss/dl_j = (1 + 2 q lse) p_j - e / V - (1 - e) [j = y]
    dloss/dz_j = dloss/dl_j  s  (1 - (l_j / c)^2)     the last factor is the slope of the cap
    dloss/dh   = sum_j dloss/dz_j w_j,    dloss/dw_j = dloss/dz_j h,    dloss/db_j = dloss/dz_j

How they are computed without the (N, V) logits (Cut Cross-Entropy, arXiv:2411.09009), one tile (tokens, columns) at a time:

- Online softmax (arXiv:1805.02867). With m the largest logit so far, the sum of exp(l_j - m) is multiplied by
  exp(m_old - m_new) whenever m grows, and so is the sum of exp(l_j - m) slope_j w_j: of the gradient by h only the factor
  s (1 + 2 q lse) / sum is missing until the end. So one pass gives loss and gradient. The exception is smoothing together
  with a cap, whose term (e / V) slope_j w_j would need a product of its own (`LossOptions.linear`).
- The target apart. l_y is computed in the wide dtype, and its term is left out of all tiles: what is left gives
  1 - p_y = sum of the others / sum (`one_minus_p`) without cancellation, so that a confident token keeps its gradient,
  which is -(1 - p_y), even where products are in bf16.
- The fp16 lift. exp(l_j - m) is at most 1, and fp16 loses what is below 2^-24: on its way into a product in fp16 it is
  multiplied by 2^14 (the largest fp16 number is near 2^16), and the sum is divided by it.
- The upstream gradient, and with it the factor of a gradient scaler, is multiplied in the wide dtype before anything is
  rounded.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_lite.loss_sizes import panel_shape
from adapterhub_lite.losses.problem import Block, Gradients, Problem, TokenStatistics, Wanted
from adapterhub_lite.losses.reference import LossOptions
from adapterhub_lite.losses.tiles import (
    HALF_LIFT,
    Panel,
    TileBuffers,
    cap_slope,
    exponential_,
    finish_logits,
    set_targets,
    spans,
)

TRITON_BLOCK = 2**15
"""Rows of the head that the kernels are given at once: what is joined, gathered or dequantised for them."""


@dataclass(frozen=True)
class LogitGradient:
    """slope_j dloss/dl_j of each token, (n,) each: `scale` slope_j exp(l_j - `largest`) for all but the target,
    `target` for the target, and -e / V for both. The fp16 lift is in `scale`; the logit scale is not."""

    largest: Tensor
    scale: Tensor
    target: Tensor


@dataclass(frozen=True)
class FirstPass:
    """What the first pass gives. Where a gradient was asked for, `logit_gradient`, and `hidden_gradient` (n, D) for an
    upstream gradient of one."""

    losses: Tensor
    statistics: TokenStatistics
    hidden_gradient: Tensor | None = None
    logit_gradient: LogitGradient | None = None


def first_pass(problem: Problem, *, gradient: bool, panel: Panel | None = None) -> FirstPass:
    """One pass over the tiles: losses, log-sum-exp and, if asked for, the gradient of the hidden states.

    A `panel`, for at least as many tokens, is filled with the exponentials, from which the head's gradient is made.
    """
    buffers = problem.buffers() if panel is None else panel.buffers
    if panel is not None:
        panel.begin(len(problem.targets))
    sums = _Sums(problem, buffers, gradient, panel)
    if problem.triton:
        from adapterhub_lite.losses.triton_tiles import SharedSums

        shared = SharedSums(problem, sums.hidden_gradient)
        for block in problem.blocks(TRITON_BLOCK):
            sums.begin_block(block)
            shared.add(block)
        sums.largest, sums.exponentials, sums.logits = shared.joined()
        return sums.finished()
    for block in problem.blocks(buffers.shape.vocabulary):
        sums.begin_block(block)
        for part in spans(len(problem.targets), buffers.shape.tokens):
            sums.add_tile(block, part)
    return sums.finished()


class _Sums:
    """The first pass: sums over the vocabulary so far, relative to the largest logit so far, the target left out."""

    def __init__(self, problem: Problem, buffers: TileBuffers, gradient: bool, panel: Panel | None) -> None:
        self.problem, self.buffers, self.panel = problem, buffers, panel
        tokens, columns = problem.hidden.shape
        self.largest = problem.zeros(tokens).fill_(torch.finfo(problem.wide).min)
        self.exponentials = problem.zeros(tokens)
        self.logits = problem.zeros(tokens)
        self.hidden_gradient = problem.zeros(tokens, columns) if gradient else None
        self.rows = problem.zeros(columns)
        self.target_rows = torch.empty_like(problem.hidden)

    def begin_block(self, block: Block) -> None:
        """Take from the rows of the head what is not taken tile by tile."""
        targets, columns = self.problem.targets, block.columns
        inside = self.problem.tokens_of(columns)
        self.target_rows[inside] = block.weight[targets[inside] - columns.start]
        if self.problem.options.label_smoothing and self.hidden_gradient is not None:
            self.rows += block.weight.sum(0, dtype=self.rows.dtype)

    def add_tile(self, block: Block, part: slice) -> None:
        """Add the tokens `part` against the block."""
        problem, options = self.problem, self.problem.options
        tile = self.buffers.logits(problem.hidden[part], block.weight, block.bias, options)
        if options.label_smoothing:
            self.logits[part] += tile.sum(1)
        set_targets(tile, problem.targets[part], block.columns, -torch.inf)
        largest = torch.maximum(self.largest[part], tile.amax(1))
        shrink = torch.exp(self.largest[part] - largest)
        self.largest[part] = largest
        used = self.hidden_gradient is not None or self.panel is not None
        slope = cap_slope(tile, options) if used else None
        exponential_(tile.sub_(largest[:, None]))
        self.exponentials[part] = self.exponentials[part] * shrink + tile.sum(1)
        if not used:
            return
        if slope is not None:
            tile.mul_(slope)
        if self.buffers.dtype == torch.float16:
            tile.mul_(HALF_LIFT)
        narrow = self.buffers.narrowed(tile) if self.panel is None else self.panel.keep(tile, block.columns, largest)
        if self.hidden_gradient is not None:
            self.buffers.add_product(self.hidden_gradient[part].mul_(shrink[:, None]), narrow, block.weight)

    def finished(self) -> FirstPass:
        """Put the target to the sums, and make of them what was asked for."""
        problem, options = self.problem, self.problem.options
        target_logits = self._target_logits()
        largest = torch.maximum(self.largest, target_logits)
        others = self.exponentials * torch.exp(self.largest - largest)
        target = torch.exp(target_logits - largest)
        total = others + target
        logsumexp = largest + total.log()
        losses = (largest - target_logits) + total.log()
        if options.label_smoothing:
            losses = losses + options.label_smoothing * (target_logits - self.logits / problem.vocabulary)
        if options.z_loss:
            losses = losses + options.z_loss * logsumexp.square()
        statistics = TokenStatistics(logsumexp, target_logits, others / total)
        if self.hidden_gradient is None and self.panel is None:
            return FirstPass(losses, statistics)
        factor = 1 + 2 * options.z_loss * logsumexp
        of_target = (factor - 1) * target / total - statistics.one_minus_p + options.label_smoothing
        slope = cap_slope(target_logits, options)
        lift = HALF_LIFT if self.buffers.dtype == torch.float16 else 1.0
        logit_gradient = LogitGradient(
            largest, factor / (total * lift), of_target if slope is None else of_target * slope
        )
        return FirstPass(losses, statistics, self._hidden_gradient(logit_gradient), logit_gradient)

    def _target_logits(self) -> Tensor:
        """l_y (n,) in the wide dtype, without a wide copy of all states and rows."""
        problem = self.problem
        found = problem.zeros(len(problem.targets))
        for part in spans(len(found), self.buffers.shape.tokens):
            found[part] = (problem.hidden[part].to(found.dtype) * self.target_rows[part].to(found.dtype)).sum(1)
        return finish_logits(found, None if problem.bias is None else problem.bias[problem.targets], problem.options)

    def _hidden_gradient(self, of_logits: LogitGradient) -> Tensor | None:
        """The sums over the vocabulary as dloss/dh, in place."""
        gradient, options = self.hidden_gradient, self.problem.options
        if gradient is None:
            return None
        gradient.mul_((of_logits.scale * torch.exp(self.largest - of_logits.largest))[:, None])
        for part in spans(len(gradient), 1024):
            gradient[part].addcmul_(self.target_rows[part].to(gradient.dtype), of_logits.target[part, None])
        if options.label_smoothing:
            gradient.sub_(self.rows * (options.label_smoothing / self.problem.vocabulary))
        return gradient.mul_(options.logit_scale) if options.logit_scale != 1.0 else gradient


def second_pass(
    problem: Problem, statistics: TokenStatistics, upstream: Tensor, wanted: Wanted, rows_dtype: torch.dtype
) -> Gradients:
    """Every tile recomputed and turned into gradients, weighted by `upstream` (n,) before anything is rounded.

    The gradient of the head's rows is returned in `rows_dtype`, so that there is no second, wide copy of it.
    """
    width = 0 if wanted.columns is None else wanted.columns.stop - wanted.columns.start
    found = Gradients(
        problem.zeros(*problem.hidden.shape) if wanted.hidden else None,
        torch.zeros((problem.vocabulary, width), dtype=rows_dtype, device=problem.device) if wanted.columns else None,
        problem.zeros(problem.vocabulary) if wanted.bias else None,
    )
    inputs = problem.hidden[:, wanted.columns or slice(0, 0)]
    by = _SecondPass(problem, statistics, upstream, inputs)
    kernels = None
    if problem.triton:
        from adapterhub_lite.losses.triton_tiles import BlockGradients

        kernels = BlockGradients(problem, statistics, upstream)
    for block in problem.blocks(TRITON_BLOCK if kernels else by.buffers.shape.vocabulary):
        columns = block.columns
        of_rows = None if found.rows is None else problem.zeros(columns.stop - columns.start, width)
        of_block = Gradients(found.hidden, of_rows, None if found.bias is None else found.bias[columns])
        if kernels:
            kernels.add(block, of_block, inputs)
        else:
            for part in spans(len(problem.targets), by.buffers.shape.tokens):
                by.add_tile(block, part, of_block)
        for here in problem.tokens_of(columns).split(by.buffers.shape.tokens):
            by.add_targets(block, here, of_block)
        if of_rows is not None and found.rows is not None:
            found.rows[columns] = of_rows
    return found


class _SecondPass:
    """What the second pass adds to the gradients of a block of the head; `inputs` (n, d) give those of its rows."""

    def __init__(self, problem: Problem, statistics: TokenStatistics, upstream: Tensor, inputs: Tensor) -> None:
        self.problem, self.statistics, self.upstream, self.inputs = problem, statistics, upstream, inputs
        self.buffers = problem.buffers()
        self.of_targets = _gradient_of_targets(problem, statistics, upstream)

    def add_tile(self, block: Block, part: slice, found: Gradients) -> None:
        """Add the gradients by the tokens `part`, all but their targets'."""
        problem, buffers = self.problem, self.buffers
        tile = buffers.logits(problem.hidden[part], block.weight, block.bias, problem.options)
        _to_gradient(tile, problem, self.statistics, part)
        tile.mul_((self.upstream[part] * problem.options.logit_scale)[:, None])
        set_targets(tile, problem.targets[part], block.columns, 0.0)
        narrow = buffers.narrowed(tile)
        if found.bias is not None:
            found.bias.add_(tile.sum(0))
        if found.hidden is not None:
            buffers.add_product(found.hidden[part], narrow, block.weight)
        if found.rows is not None:
            buffers.add_product(found.rows, narrow.t(), self.inputs[part])

    def add_targets(self, block: Block, here: Tensor, found: Gradients) -> None:
        """Add those of the targets of the tokens `here`, which lie in the block."""
        local, of_target = self.problem.targets[here] - block.columns.start, self.of_targets[here]
        if found.bias is not None:
            found.bias.index_add_(0, local, of_target)
        if found.hidden is not None:
            found.hidden.index_add_(0, here, block.weight[local] * of_target[:, None])
        if found.rows is not None:
            found.rows.index_add_(0, local, self.inputs[here] * of_target[:, None])


def _to_gradient(tile: Tensor, problem: Problem, statistics: TokenStatistics, part: slice) -> None:
    """Turn a tile of logits into slope_j dloss/dl_j in place, right for all but the targets."""
    options = problem.options
    slope = cap_slope(tile, options)
    exponential_(tile.sub_(statistics.logsumexp[part, None]))
    if options.z_loss:
        tile.mul_((1 + 2 * options.z_loss * statistics.logsumexp[part])[:, None])
    if options.label_smoothing:
        tile.sub_(options.label_smoothing / problem.vocabulary)
    if slope is not None:
        tile.mul_(slope)


def _gradient_of_targets(problem: Problem, statistics: TokenStatistics, upstream: Tensor) -> Tensor:
    """upstream dloss/dz_y (n,): apart from the tiles, so that p - 1 is not rounded with them."""
    options, one_minus_p = problem.options, statistics.one_minus_p
    gradient = options.label_smoothing - options.label_smoothing / problem.vocabulary - one_minus_p
    if options.z_loss:
        gradient = gradient + 2 * options.z_loss * statistics.logsumexp * (1 - one_minus_p)
    slope = cap_slope(statistics.target_logits, options)
    return gradient * upstream * options.logit_scale * (1.0 if slope is None else slope)


def takes_one_pass(options: LossOptions, products: torch.dtype) -> bool:
    """Whether `weighted_loss` can be used: in fp16, hidden states times a token's weight would leave its range."""
    return options.linear and products != torch.float16


def weighted_loss(problem: Problem, weights: Tensor, wanted: Wanted) -> tuple[Tensor, Gradients]:
    """The sum over n tokens of `weights` (n,) times loss, a scalar, with its gradients, all in the wide dtype.

    Three products instead of the four of two passes. It holds where each token's weight in the loss is known beforehand,
    as in a sum or a mean: a panel of tokens is taken through the whole vocabulary, its exponentials are kept, and its
    part of the head's gradient is made from them.
    """
    shape = panel_shape(len(weights), problem.vocabulary, problem.device.type, problem.options.chunk_tokens)
    panel = Panel(TileBuffers(shape, problem.hidden.dtype, problem.device), problem.vocabulary)
    by_hidden = torch.empty(problem.hidden.shape, dtype=problem.wide, device=problem.device) if wanted.hidden else None
    head, loss = _HeadSums(problem, wanted), problem.zeros()
    for part in spans(len(weights), shape.tokens):
        some = replace(problem, hidden=problem.hidden[part], targets=problem.targets[part])
        first = first_pass(some, gradient=wanted.hidden, panel=panel)
        loss += (first.losses * weights[part]).sum()
        if by_hidden is not None and first.hidden_gradient is not None:
            torch.mul(first.hidden_gradient, weights[part, None], out=by_hidden[part])
        assert first.logit_gradient is not None
        head.add(some, panel, first.logit_gradient, weights[part] * problem.options.logit_scale)
    return loss, Gradients(by_hidden, head.rows, head.bias)


class _HeadSums:
    """The gradients of the head's rows (V, d) and bias (V,), summed over panels of tokens."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        self.columns = wanted.columns
        width = 0 if wanted.columns is None else wanted.columns.stop - wanted.columns.start
        self.rows = problem.zeros(problem.vocabulary, width) if wanted.columns else None
        self.bias = problem.zeros(problem.vocabulary) if wanted.bias else None

    def add(self, problem: Problem, panel: Panel, of_logits: LogitGradient, weights: Tensor) -> None:
        """Add a panel's tokens, weighted; the logit scale is in `weights` (t,)."""
        inputs = problem.hidden if self.columns is None else problem.hidden[:, self.columns]
        for columns, exponentials, largest in panel.blocks:
            scale = weights * of_logits.scale * torch.exp(largest - of_logits.largest)
            if self.rows is not None:
                scaled = (inputs * scale[:, None]).to(inputs.dtype)
                panel.buffers.add_product(self.rows[columns], exponentials.t(), scaled)
            if self.bias is not None:
                self.bias[columns] += torch.mv(exponentials.t().to(scale.dtype), scale)
        of_target = weights * of_logits.target
        # The term -e / V of label smoothing is the same for all rows.
        smoothing = weights * (problem.options.label_smoothing / problem.vocabulary)
        if self.rows is not None:
            self.rows.index_add_(0, problem.targets, inputs * of_target[:, None])
            if problem.options.label_smoothing:
                self.rows.sub_((inputs * smoothing[:, None]).sum(0))
        if self.bias is not None:
            self.bias.index_add_(0, problem.targets, of_target).sub_(smoothing.sum())
