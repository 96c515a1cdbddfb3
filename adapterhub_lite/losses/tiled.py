"""Cross entropy of a linear head, tile by tile over the valid tokens. Knows torch only.

No (tokens, vocabulary) tensor is ever held: a tile is (chunk_tokens, V), and its gradient is recomputed in backward.
"""

from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.losses.options import LossOptions, check_shapes, check_targets
from adapterhub_lite.losses.reference import reduce_losses

TILE_BYTES = 32 * 2**20


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
        weight: (V, D); its gradient is computed only where it is wanted, as that of `bias` (V,).
        targets: (N,) int64; positions equal to `ignore_index` cost nothing, and give no loss and no gradient.
        reduction: `mean` divides by the sum of the valid tokens' weights (1 each without `token_weights`).
        token_weights: (N,), multiplies each token's loss.
        chunk_tokens: tokens in a tile; None chooses by size.

    Returns:
        A scalar in fp32 (fp64 for fp64), or (N,) for `reduction="none"`. All targets ignored: a differentiable zero.

    Raises:
        UsageError: shapes that do not fit, a target outside the vocabulary, an option out of its range.
    """
    options = LossOptions(ignore_index, reduction, softcap, logit_scale, label_smoothing, z_loss, chunk_tokens)
    check_shapes(hidden, weight, targets, bias, token_weights)
    valid = targets != ignore_index
    index = valid.nonzero().squeeze(1)
    check_targets(targets[index], weight.shape[0])
    kept = _TiledLosses.apply(hidden[index], weight, bias, targets[index], options)
    losses = torch.zeros(targets.shape, dtype=kept.dtype, device=kept.device).index_put((index,), kept)
    return reduce_losses(losses, valid, reduction, token_weights)


class _TiledLosses(torch.autograd.Function):
    """Losses (n,) of n valid tokens; recomputes each tile in backward, so that it sees a scaled upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: LossOptions
    ) -> Tensor:
        step = options.chunk_tokens or max(1, TILE_BYTES // (4 * weight.shape[0]))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        lse = torch.empty_like(losses)
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = _tile_logits(hidden[part], weight, bias, options)
            lse[part] = torch.logsumexp(logits, -1)
            picked = logits.gather(1, targets[part, None]).squeeze(1)
            smooth = options.label_smoothing
            losses[part] = lse[part] - (1 - smooth) * picked
            if smooth:
                losses[part] -= smooth * logits.mean(-1)
            if options.z_loss:
                losses[part] += options.z_loss * lse[part].square()
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.options, ctx.step = options, step
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        wide = upstream[0].dtype
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(weight.shape[:1], dtype=wide, device=weight.device) if want_bias else None
        for start in range(0, len(targets), ctx.step):
            part = slice(start, start + ctx.step)
            logits = _tile_logits(hidden[part], weight, bias, ctx.options)
            grad = _tile_gradient(logits, targets[part], lse[part], upstream[0][part], ctx.options)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if options.logit_scale != 1.0:
        logits *= options.logit_scale
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits


def _tile_gradient(logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, options: LossOptions) -> Tensor:
    """Gradient (t, V) of the weighted losses by hidden @ weight.T + bias."""
    grad = torch.exp(logits - lse[:, None])
    if options.z_loss:
        grad *= (1 + 2 * options.z_loss * lse)[:, None]
    if options.label_smoothing:
        grad -= options.label_smoothing / logits.shape[1]
    rows = torch.arange(len(targets), device=targets.device)
    grad[rows, targets] -= 1 - options.label_smoothing
    if options.softcap is not None:
        grad *= 1 - (logits / options.softcap).square()
    return grad * (upstream * options.logit_scale)[:, None]
