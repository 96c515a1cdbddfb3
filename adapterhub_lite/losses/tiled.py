"""Cross entropy of a linear head without its logits, on any device: what autograd sees. Knows torch only.

Three ways, one interface; `passes` has the mathematics. Where only the hidden states are trained, one pass over the
tiles gives the losses and their gradient, kept in fp32 for an upstream gradient of one and scaled in backward. Where the
head is trained too and the losses are summed, so does one pass over panels of tokens. For the rest the forward pass keeps
only the log-sum-exp and backward recomputes the tiles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapterhub_lite.errors import ConfigurationError, UsageError
from adapterhub_lite.losses.passes import first_pass, second_pass, takes_one_pass, weighted_loss
from adapterhub_lite.losses.problem import Problem, TokenStatistics, Wanted
from adapterhub_lite.losses.reference import LossOptions, mean_divisor, reduce_losses
from adapterhub_lite.losses.rows import is_quantised, is_sharded, is_zero3, open_rows, rows_shape, whole
from adapterhub_lite.losses.tiles import product_dtype, spans, wide_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Same value and gradients as `F.cross_entropy` on `hidden @ weight.T + bias`, without the (N, V) logits.

    Args:
        hidden: (N, D), any floating dtype.
        weight: (V, D); a gradient is computed only where it requires one, as for `bias` (V,). A DTensor or a ZeRO-3
            parameter is gathered in forward and in backward; a bitsandbytes one is dequantised in blocks.
        targets: (N,) int64; positions equal to `ignore_index` cost nothing, and give no loss and no gradient.
        reduction: `mean` divides by the sum of the valid tokens' weights (1 each without `token_weights`).
        softcap: see `LossOptions`, as for the next three.
        logit_scale: a factor on the logits.
        label_smoothing: share of the target spread over the vocabulary.
        z_loss: weight of the squared log-partition.
        token_weights: (N,), multiplies each token's loss; a constant, it gets no gradient.
        chunk_tokens: tokens in a tile; None chooses by size.

    Returns:
        A scalar in fp32 (fp64 for fp64), or (N,) for `reduction="none"`. All targets ignored: a differentiable zero.

    Raises:
        UsageError: shapes that do not fit, a target outside the vocabulary, an option out of its range.
    """
    options = LossOptions(ignore_index, reduction, softcap, logit_scale, label_smoothing, z_loss, chunk_tokens)
    return tiled_cross_entropy(hidden, weight, targets, options, bias=bias, token_weights=token_weights)


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    extra: Tensor | None = None,
    triton: bool = False,
) -> Tensor:
    """`linear_cross_entropy` with its options in one object, and `extra` (V, r), more columns of the head.

    `hidden` is then (N, D + r). This is how a LoRA on the head is trained: z = [h, s * A h] @ [W, B].T exactly, so
    that B gets its gradient here and A through the hidden states.

    Raises:
        ConfigurationError: a trained head that ZeRO-3 holds in parts.
        UsageError: as `linear_cross_entropy`.
    """
    if any(x is not None and x.requires_grad and is_zero3(x) for x in (weight, bias)):
        raise ConfigurationError(
            "A trained head under ZeRO-3 cannot be read outside its module: use the full loss, ZeRO-2, or freeze it."
        )
    bias = None if bias is None else whole(bias)
    shape = rows_shape(weight)
    check_shapes(shape, hidden=hidden, targets=targets, bias=bias, token_weights=token_weights, extra=extra)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if weight.requires_grad and is_sharded(weight):
        weight = whole(weight)
    valid = targets != options.ignore_index
    index = valid.nonzero().squeeze(1)
    everything = len(index) == len(targets)
    kept = targets if everything else targets[index]
    check_targets(kept, shape[0])
    if not everything:
        hidden = hidden.index_select(0, index)
    frozen = weight if is_quantised(weight) or not weight.requires_grad else None
    head = (weight if weight.requires_grad else None, bias, extra)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    products = product_dtype(hidden.dtype, hidden.device)
    if trained and not triton and options.reduction != "none" and takes_one_pass(options, products):
        shares = hidden.new_ones(len(index), dtype=wide_dtype(hidden.dtype))
        weights = shares if token_weights is None else shares * token_weights[index]
        total = _WeightedSum.apply(hidden, *head, _Constants(kept, options, frozen, triton), weights)
        return total if options.reduction == "sum" else total / mean_divisor(valid, token_weights).to(total.dtype)
    each = _Constants(kept, replace(options, reduction="none"), frozen, triton)
    losses = _TokenLosses.apply(hidden, *head, each, torch.is_grad_enabled())
    if not everything:
        losses = torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device).index_put((index,), losses)
    return reduce_losses(losses, valid, options.reduction, token_weights)


def check_shapes(
    head: tuple[int, int],
    *,
    hidden: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    extra: Tensor | None,
) -> None:
    """Refuse tensors that do not fit together, naming every misfit at once; `head` is the weight's (V, D).

    Raises:
        UsageError: not hidden (N, D), targets (N,) int64, bias (V,), token_weights (N,), extra (V, r).
    """
    vocabulary, columns = head[0], head[1] + (0 if extra is None else extra.shape[-1])
    problems = []
    if hidden.dim() != 2 or hidden.shape[1] != columns or not hidden.is_floating_point():
        problems.append(f"hidden (N, {columns}) came as {tuple(hidden.shape)} {hidden.dtype}")
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        problems.append(f"targets (N,) int64 came as {tuple(targets.shape)} {targets.dtype}")
    if bias is not None and bias.shape != (vocabulary,):
        problems.append(f"bias ({vocabulary},) came as {tuple(bias.shape)}")
    if token_weights is not None and token_weights.shape != targets.shape:
        problems.append(f"token_weights (N,) came as {tuple(token_weights.shape)}")
    if extra is not None and (extra.dim() != 2 or extra.shape[0] != vocabulary):
        problems.append(f"extra ({vocabulary}, r) came as {tuple(extra.shape)}")
    if problems:
        raise UsageError("The tensors of linear_cross_entropy do not fit together: " + "; ".join(problems) + ".")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Refuse valid targets outside [0, vocabulary): without the check they would read another token's row.

    Raises:
        UsageError: a target, not ignored, is outside the vocabulary.
    """
    if targets.numel():
        low, high = torch.stack(torch.aminmax(targets)).tolist()
        if low < 0 or high >= vocabulary:
            raise UsageError(f"targets must be in [0, {vocabulary}) or ignore_index, not {low if low < 0 else high}.")


@dataclass(frozen=True)
class _Constants:
    """What autograd does not see: targets (n,), options, and a frozen head's weight, None for a trained one.

    A frozen weight may be a DTensor, empty outside its module, or packed bytes.
    """

    targets: Tensor
    options: LossOptions
    frozen: Tensor | None
    triton: bool

    @contextmanager
    def problem(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, extra: Tensor | None
    ) -> Iterator[Problem]:
        """The problem of one pass, while the head's rows can be read."""
        held = weight if self.frozen is None else self.frozen
        assert held is not None
        with open_rows(held) as read:

            def joined(part: slice) -> Tensor:
                rows = read(part)
                return rows if extra is None else torch.cat([rows, extra[part].to(rows.dtype)], 1)

            states = hidden if self.triton else hidden.to(product_dtype(hidden.dtype, hidden.device))
            yield Problem(states, self.targets, joined, rows_shape(held)[0], bias, self.options, self.triton)


def _wanted(needed: tuple[bool, ...], hidden: Tensor, extra: Tensor | None) -> Wanted:
    """What of (hidden, weight, bias, extra) gets a gradient; of the rows [weight, extra], all where the weight does."""
    columns = None
    if needed[1]:
        columns = slice(0, hidden.shape[1])
    elif needed[3] and extra is not None:
        columns = slice(hidden.shape[1] - extra.shape[1], hidden.shape[1])
    return Wanted(needed[0], columns, needed[2])


def _split(rows: Tensor | None, needed: tuple[bool, ...], columns: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the head's rows as (weight, extra), each None where it is not trained."""
    if rows is None or not needed[1]:
        return None, rows
    return rows[:, :columns], rows[:, columns:] if needed[3] else None


def _scaled(unit: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """unit * factor, multiplied in the wide dtype and rounded once; in parts, so that no second wide copy is held."""
    if unit is None:
        return None
    scaled = torch.empty(unit.shape, dtype=dtype, device=unit.device)
    for part in spans(len(unit), 4096):
        torch.mul(unit[part], factor[part] if factor.dim() else factor, out=scaled[part])
    return scaled


class _TokenLosses(torch.autograd.Function):
    """Losses (n,) of n valid tokens, in the wide dtype."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context takes whatever attributes it is given
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: Tensor | None,
        constants: _Constants,
        training: bool,
    ) -> Tensor:
        wanted = _wanted(ctx.needs_input_grad, hidden, extra)
        head_trained = wanted.columns is not None or wanted.bias
        one_pass = wanted.hidden and not head_trained and constants.options.linear
        with constants.problem(hidden, weight, bias, extra) as problem:
            first = first_pass(problem, gradient=training and one_pass)
        ctx.constants, ctx.one_pass, ctx.dtype = constants, one_pass, hidden.dtype
        if training and one_pass:
            ctx.save_for_backward(first.hidden_gradient)
        elif training:
            kept = first.statistics
            ctx.save_for_backward(hidden, weight, bias, extra, kept.logsumexp, kept.target_logits, kept.one_minus_p)
        return first.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.one_pass:
            return _scaled(ctx.saved_tensors[0], upstream[:, None], ctx.dtype), None, None, None, None, None
        hidden, weight, bias, extra, *statistics = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # The gradient of the rows comes in the dtype of what it belongs to.
        rows_dtype = next((x.dtype for x, need in ((weight, needed[1]), (extra, needed[3])) if need), None)
        with ctx.constants.problem(hidden, weight, bias, extra) as problem:
            found = second_pass(
                problem,
                TokenStatistics(*statistics),
                upstream,
                _wanted(needed, hidden, extra),
                rows_dtype or problem.wide,
            )
        by_weight, by_extra = _split(found.rows, needed, None if weight is None else weight.shape[1])
        by_bias = None if found.bias is None else found.bias.to(bias.dtype)
        by_hidden = None if found.hidden is None else found.hidden.to(hidden.dtype)
        return by_hidden, by_weight, by_bias, by_extra, None, None


class _WeightedSum(torch.autograd.Function):
    """The sum of n valid tokens' losses times their weights (n,), with a trained head; a scalar in the wide dtype."""

    @staticmethod
    def forward(
        ctx: Any,  # as above
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: Tensor | None,
        constants: _Constants,
        token_weights: Tensor,
    ) -> Tensor:
        wanted = _wanted(ctx.needs_input_grad, hidden, extra)
        with constants.problem(hidden, weight, bias, extra) as problem:
            loss, found = weighted_loss(problem, token_weights, wanted)
        ctx.save_for_backward(found.hidden, found.rows, found.bias)
        ctx.dtypes = [hidden.dtype if x is None else x.dtype for x in (hidden, weight, bias, extra)]
        ctx.columns = None if weight is None else weight.shape[1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows, bias = ctx.saved_tensors
        by_weight, by_extra = _split(rows, ctx.needs_input_grad, ctx.columns)
        units = (hidden, by_weight, bias, by_extra)
        return (*(_scaled(x, upstream, to) for x, to in zip(units, ctx.dtypes, strict=True)), None, None)
