"""Cross entropy of a linear head without its logits, on any device. Knows torch only.

Three ways, one interface. Where only the hidden states are trained, one pass over the tiles gives the losses and their
gradient, kept in fp32 for an upstream gradient of one and scaled in backward. Where the head is trained too and the
losses are summed, so does one pass over panels of tokens (`head_gradient`). For the rest the forward pass keeps only
the log-sum-exp and backward makes the tiles again. In all, the upstream gradient (and with it the factor of a gradient
scaler) is multiplied before anything is rounded.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses.head_gradient import in_one_pass, weighed_loss
from adapterhub_lite.losses.options import LossOptions, check_shapes, check_targets
from adapterhub_lite.losses.passes import Problem, Statistics, gradients, statistics
from adapterhub_lite.losses.reference import mean_divisor, reduce_losses
from adapterhub_lite.losses.rows import (
    RowReader,
    is_quantised,
    is_sharded,
    is_zero3,
    open_rows,
    rows_shape,
    whole,
)
from adapterhub_lite.losses.tiles import spans, wide_dtype


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
        weight: (V, D); its gradient is computed only where it is wanted, as that of `bias` (V,). A DTensor or a
            ZeRO-3 parameter is gathered in forward and in backward; a bitsandbytes one is unpacked in blocks.
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
) -> Tensor:
    """`linear_cross_entropy` with its options in one object, and `extra` (V, r), more columns of the head.

    `hidden` is then (N, D + r). This is how a LoRA on the head is trained: z = [h, s * A h] @ [W, B].T exactly, so
    that B gets its gradient here and A through the hidden states.
    """
    trained = [x for x in (weight, bias) if x is not None and x.requires_grad]
    if any(is_zero3(x) for x in trained):
        raise ConfigurationError(
            "A trained head under ZeRO-3 cannot be read outside its module: use the full loss, ZeRO-2, or freeze it."
        )
    bias = None if bias is None else whole(bias)
    check_shapes(hidden, rows_shape(weight), targets, bias, token_weights, extra)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if weight.requires_grad and is_sharded(weight):
        weight = whole(weight)
    valid = targets != options.ignore_index
    index = valid.nonzero().squeeze(1)
    everything = len(index) == len(targets)
    kept = targets if everything else targets[index]
    check_targets(kept, rows_shape(weight)[0])
    if not everything:
        hidden = hidden.index_select(0, index)
    frozen = _Frozen(weight) if is_quantised(weight) or not weight.requires_grad else None
    head = (hidden, frozen, weight if weight.requires_grad else None, bias, extra, kept)
    if options.reduction != "none" and _head_is_trained(weight, bias, extra):
        problem = Problem(hidden, kept, rows_shape(weight)[0], bias, options)
        if in_one_pass(problem):
            shares = hidden.new_ones(len(index), dtype=wide_dtype(hidden.dtype))
            total = _WeighedSum.apply(
                *head, shares if token_weights is None else shares * token_weights[index], options
            )
            return total if options.reduction == "sum" else total / mean_divisor(valid, token_weights).to(total.dtype)
    losses = _TiledLosses.apply(*head, replace(options, reduction="none"), torch.is_grad_enabled())
    if not everything:
        losses = torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device).index_put((index,), losses)
    return reduce_losses(losses, valid, options.reduction, token_weights)


def _head_is_trained(*parameters: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters)


@dataclass(frozen=True)
class _Frozen:
    """A weight that autograd shall not see: it may be a DTensor, empty outside its module, or packed bytes."""

    weight: Tensor


class _TiledLosses(torch.autograd.Function):
    """Losses (n,) of n valid tokens, in the wide dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        frozen: _Frozen | None,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: Tensor | None,
        targets: Tensor,
        options: LossOptions,
        training: bool,
    ) -> Tensor:
        rows = frozen.weight if frozen is not None else weight
        assert rows is not None
        wanted = ctx.needs_input_grad
        head_trained = wanted[2] or wanted[3] or wanted[4]
        one_pass = wanted[0] and not head_trained and options.linear
        problem = Problem(hidden, targets, rows_shape(rows)[0], bias, options)
        with open_rows(rows) as read:
            known = statistics(problem, _with_extra(read, extra), gradient=training and one_pass)
        ctx.frozen, ctx.options, ctx.one_pass, ctx.dtype = frozen, options, one_pass, hidden.dtype
        if training and one_pass:
            ctx.save_for_backward(known.gradient)
        elif training:
            ctx.save_for_backward(
                hidden, weight, bias, extra, targets, known.logsumexp, known.target_logits, known.doubt
            )
        return known.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.one_pass:
            (unit,) = ctx.saved_tensors
            return _scaled(unit, upstream[:, None], ctx.dtype), *[None] * 7
        hidden, weight, bias, extra, targets, logsumexp, target_logits, doubt = ctx.saved_tensors
        rows = ctx.frozen.weight if ctx.frozen is not None else weight
        known = Statistics(upstream, logsumexp, target_logits, doubt, None)
        problem = Problem(hidden, targets, rows_shape(rows)[0], bias, ctx.options)
        wanted = ctx.needs_input_grad
        columns = _trained_columns(wanted, hidden, extra)
        trained = None if columns is None else (columns, (weight if wanted[2] else extra).dtype)
        with open_rows(rows) as read:
            found = gradients(
                problem,
                _with_extra(read, extra),
                known,
                upstream,
                hidden_wanted=wanted[0],
                rows_wanted=trained,
                bias_wanted=wanted[3],
            )
        by_weight, by_extra = _split(found.rows, wanted, None if weight is None else weight.shape[1])
        by_bias = None if found.bias is None else found.bias.to(bias.dtype)
        by_hidden = None if found.hidden is None else found.hidden.to(hidden.dtype)
        return by_hidden, None, by_weight, by_bias, by_extra, None, None, None


class _WeighedSum(torch.autograd.Function):
    """The sum of n valid tokens' losses times their weights (n,), with a trained head; a scalar in the wide dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        frozen: _Frozen | None,
        weight: Tensor | None,
        bias: Tensor | None,
        extra: Tensor | None,
        targets: Tensor,
        token_weights: Tensor,
        options: LossOptions,
    ) -> Tensor:
        rows = frozen.weight if frozen is not None else weight
        assert rows is not None
        wanted = ctx.needs_input_grad
        with open_rows(rows) as read:
            found = weighed_loss(
                Problem(hidden, targets, rows_shape(rows)[0], bias, options),
                _with_extra(read, extra),
                token_weights,
                hidden_wanted=wanted[0],
                rows_wanted=_trained_columns(wanted, hidden, extra),
                bias_wanted=wanted[3],
            )
        ctx.save_for_backward(found.gradients.hidden, found.gradients.rows, found.gradients.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, extra)]
        ctx.columns = None if weight is None else weight.shape[1]
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        hidden, rows, bias = ctx.saved_tensors
        by_weight, by_extra = _split(rows, ctx.needs_input_grad, ctx.columns)
        units = (hidden, by_weight, bias, by_extra)
        scaled = [None if x is None else _scaled(x, upstream, to) for x, to in zip(units, ctx.dtypes, strict=True)]
        return scaled[0], None, *scaled[1:], None, None, None


def _scaled(unit: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """unit * factor, multiplied in the wide dtype and rounded once; in parts, so that no second wide copy is held."""
    scaled = torch.empty(unit.shape, dtype=dtype, device=unit.device)
    for part in spans(len(unit), 4096):
        torch.mul(unit[part], factor[part] if factor.dim() else factor, out=scaled[part])
    return scaled


def _trained_columns(wanted: Any, hidden: Tensor, extra: Tensor | None) -> slice | None:
    """Columns of [weight, extra] that get a gradient: all where the weight does, else those of `extra`."""
    if wanted[2]:
        return slice(0, hidden.shape[1])
    if wanted[4]:
        assert extra is not None
        return slice(hidden.shape[1] - extra.shape[1], hidden.shape[1])
    return None


def _split(rows: Tensor | None, wanted: Any, columns: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the head's rows as (weight, extra): whichever is trained."""
    if rows is None:
        return None, None
    if not wanted[2]:
        return None, rows
    return (rows[:, :columns], rows[:, columns:]) if wanted[4] else (rows[:, :columns], None)


def _with_extra(read: RowReader, extra: Tensor | None) -> RowReader:
    if extra is None:
        return read

    def joined(part: slice) -> Tensor:
        rows = read(part)
        return torch.cat([rows, extra[part].to(rows.dtype)], 1)

    return joined
