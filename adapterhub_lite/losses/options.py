"""What a loss is asked for, checked once at the door. Knows torch only, and nothing of models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapterhub_lite.errors import ConfigurationError, UsageError

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """The options of one cross entropy, shared by every implementation.

    With z = hidden @ weight.T + bias, the logits are s * z (`logit_scale`), then c * tanh(s * z / c) (`softcap`, Gemma
    2, arXiv:2408.00118). The loss of a token is (1 - e) * nll + e * mean over the vocabulary (`label_smoothing`), plus
    `z_loss` * logsumexp ** 2 (PaLM, arXiv:2204.02311).
    """

    ignore_index: int = -100
    reduction: str = "mean"
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None

    @property
    def linear(self) -> bool:
        """Whether a gradient is linear in the exponentials of the logits, so that one pass can make it."""
        return not (self.softcap and self.label_smoothing)

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ConfigurationError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {self.reduction!r}.")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigurationError(f"softcap must be positive or None, not {self.softcap}.")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigurationError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        if self.z_loss < 0:
            raise ConfigurationError(f"z_loss must not be negative, not {self.z_loss}.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ConfigurationError(f"chunk_tokens must be a positive number of tokens, not {self.chunk_tokens}.")


def check_shapes(
    hidden: Tensor,
    head: tuple[int, int],
    targets: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    extra: Tensor | None = None,
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
        raise UsageError("linear_cross_entropy wants tensors that fit together: " + "; ".join(problems) + ".")


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Refuse valid targets outside [0, vocabulary): without the check they would read another token's row.

    Raises:
        UsageError: a target, not ignored, is outside the vocabulary.
    """
    if targets.numel():
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            raise UsageError(f"targets must be in [0, {vocabulary}) or ignore_index, not {low if low < 0 else high}.")
