"""The plain loss on the full logits: what every other implementation is compared with. Knows torch only."""

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.losses.options import LossOptions


def full_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> Tensor:
    """Logits (N, V) in the dtype of `hidden`, scaled and soft-capped as `options` say."""
    logits = F.linear(hidden, weight, bias)
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits


def full_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy through the whole (N, V) logits, up-cast to fp32 as the model classes of transformers do.

    Returns a scalar, or (N,) in fp32 for `reduction="none"`. All targets ignored gives a differentiable zero.
    """
    losses = losses_of_logits(full_logits(hidden, weight, bias, options), targets, options)
    return reduce_losses(losses, targets != options.ignore_index, options.reduction, token_weights)


def losses_of_logits(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """Losses (n,) of finished logits (n, V), 0 where the target is ignored; scale and cap are already in them."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits, targets, ignore_index=options.ignore_index, label_smoothing=options.label_smoothing, reduction="none"
    )
    if options.z_loss:
        losses = losses + options.z_loss * torch.logsumexp(logits, -1).square() * (targets != options.ignore_index)
    return losses


def reduce_losses(losses: Tensor, valid: Tensor, reduction: str, token_weights: Tensor | None) -> Tensor:
    """Weigh losses (N,) and reduce them; the mean divides by the sum of the valid tokens' weights, never by zero."""
    if token_weights is not None:
        losses = losses * token_weights
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / mean_divisor(valid, token_weights).to(total.dtype)


def mean_divisor(valid: Tensor, token_weights: Tensor | None) -> Tensor:
    """The sum of the valid tokens' weights, 1 where it is 0."""
    divisor = (valid.float() if token_weights is None else valid * token_weights).sum()
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
