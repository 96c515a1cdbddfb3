"""What the loss is: its options, and the plain loss on the full logits that every other implementation is compared with.

The formulas stand at the top of `passes`. Knows torch only.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.errors import ConfigurationError

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """The options of one cross entropy, shared by every implementation.

    With z = hidden @ weight.T + bias, the logits are s * z (`logit_scale`), then c * tanh(s * z / c) (`softcap`, Gemma
    2, arXiv:2408.00118). The loss of a token is (1 - e) * nll + e * mean over the vocabulary (`label_smoothing`), plus
    `z_loss` * logsumexp ** 2 (PaLM, arXiv:2204.02311). Targets equal to `ignore_index` give no loss and no gradient.
    `chunk_tokens` fixes how many tokens a tile has. `gradient_filter` lets a gradient leave out tiles of logits whose
    probabilities are all below it, which only our Triton kernels do; 0 leaves out nothing.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    gradient_filter: float = 0.0

    @property
    def linear(self) -> bool:
        """Whether a gradient is linear in the exponentials of the logits, so that one pass can compute it."""
        return not (self.softcap and self.label_smoothing)

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ConfigurationError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {self.reduction!r}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigurationError(f"softcap must be positive or None, not {self.softcap}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigurationError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        if not 0.0 <= self.gradient_filter < 1.0:
            raise ConfigurationError(f"gradient_filter must be in [0, 1), not {self.gradient_filter}.")
        if self.z_loss < 0:
            raise ConfigurationError(f"z_loss must not be negative, not {self.z_loss}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigurationError(f"chunk_tokens must be a positive number of tokens, not {self.chunk_tokens}.")


class LossKeywords(TypedDict, total=False):
    """The fields of `LossOptions` that the head of a model does not fix, and `reduction` aside."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    chunk_tokens: int | None
    gradient_filter: float


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
    """Weight losses (N,) and reduce them; the mean divides by the sum of the valid tokens' weights, never by zero."""
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
