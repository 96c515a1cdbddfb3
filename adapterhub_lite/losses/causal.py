"""The loss of a causal language model from its hidden states, by whichever implementation was chosen."""

from typing import Any

from torch import Tensor

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses.choice import LossChoice
from adapterhub_lite.losses.heads import Head
from adapterhub_lite.losses.kernels import run_kernel
from adapterhub_lite.losses.options import LossOptions
from adapterhub_lite.losses.reference import losses_of_logits, reduce_losses
from adapterhub_lite.losses.tiled import tiled_cross_entropy


def causal_lm_loss(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
    choice: LossChoice | None = None,
    **options: Any,
) -> Tensor:
    """Next-token loss of hidden states (batch, seq, D), after the final norm, with labels (batch, seq), -100 ignored.

    With `shift` the state at t is judged by the label at t + 1; without, labels are taken as already shifted.
    `token_weights` is (batch, seq), shifted as the labels are. `choice` is that of `choose_loss`; without one, tiles
    are used wherever they can read the head, and the model's own head where they cannot. Further `options` are those
    of `LossOptions`; soft cap and scale are the head's own.

    Returns a scalar on the head's device, or (batch * kept seq,) for `reduction="none"`.

    Raises:
        ConfigurationError: the choice is "model", which needs the model's logits: see `lm_loss_of_logits`.
    """
    wanted = LossOptions(reduction=reduction, softcap=head.softcap, logit_scale=head.logit_scale, **options)
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    device = head.device or hidden.device
    states = hidden.reshape(-1, hidden.shape[-1]).to(device)
    targets = labels.reshape(-1).to(device)
    weights = None if token_weights is None else token_weights.reshape(-1).to(device)
    if choice is not None and choice.name == "model":
        raise ConfigurationError("The loss 'model' is one of the model's own logits, which hidden states do not give.")
    name = choice.name if choice is not None else "full" if head.unreadable() else "tiled"
    if name == "full":
        return _full(head, states, targets, wanted, weights)
    if name != "tiled":
        return run_kernel(name, states, head, targets, wanted, weights)
    valid = targets != wanted.ignore_index
    if head.low_rank():
        # A and its dropout only for the tokens that count.
        index = valid.nonzero().squeeze(1)
        widened, extra = head.widened(states[index])
        loss = tiled_cross_entropy(
            widened,
            head.weight,
            targets[index],
            wanted,
            bias=head.bias,
            token_weights=None if weights is None else weights[index],
            extra=extra,
        )
        return loss if reduction != "none" else loss.new_zeros(valid.shape).index_put((index,), loss)
    return tiled_cross_entropy(states, head.weight, targets, wanted, bias=head.bias, token_weights=weights)


def lm_loss_of_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`causal_lm_loss` of logits (batch, seq, V) as the model returns them: what is left where its head is not known."""
    wanted = LossOptions(reduction=reduction, **options)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    targets = labels.reshape(-1).to(logits.device)
    weights = None if token_weights is None else token_weights.reshape(-1).to(logits.device)
    losses = losses_of_logits(logits.flatten(0, 1), targets, wanted)
    return reduce_losses(losses, targets != wanted.ignore_index, reduction, weights)


def _full(head: Head, states: Tensor, targets: Tensor, options: LossOptions, weights: Tensor | None) -> Tensor:
    """Through the model's own head, called even for no valid token: partitioned weights are gathered by all or none."""
    valid = targets != options.ignore_index
    index = valid.nonzero().squeeze(1)
    losses = losses_of_logits(head.logits(states[index]), targets[index], options)
    return _spread(losses, index, valid, options, weights)


def _spread(losses: Tensor, index: Tensor, valid: Tensor, options: LossOptions, weights: Tensor | None) -> Tensor:
    """Losses of the valid tokens back to all tokens, then reduced."""
    everywhere = losses.new_zeros(valid.shape).index_put((index,), losses)
    return reduce_losses(everywhere, valid, options.reduction, weights)
