"""The loss of a causal language model from its hidden states. Knows torch only."""

from typing import Any

from torch import Tensor

from adapterhub_lite.losses.heads import Head
from adapterhub_lite.losses.tiled import linear_cross_entropy


def causal_lm_loss(
    head: Head, hidden: Tensor, labels: Tensor, *, shift: bool = True, reduction: str = "sum", **options: Any
) -> Tensor:
    """Next-token loss of hidden states (batch, seq, D), after the final norm, with labels (batch, seq), -100 ignored.

    With `shift` the state at t is judged by the label at t + 1; without, labels are taken as already shifted.
    `options` go to `linear_cross_entropy`. Returns a scalar, or (batch * kept seq,) for `reduction="none"`.
    """
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        labels.reshape(-1),
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        reduction=reduction,
        **options,
    )
