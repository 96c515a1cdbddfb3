"""The loss of a causal language model from its hidden states, by whichever implementation was chosen."""

from functools import partial
from typing import Unpack

from torch import Tensor

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses.choice import LossChoice
from adapterhub_lite.losses.heads import Head
from adapterhub_lite.losses.kernels import KERNELS, OWN_KERNEL, run_kernel
from adapterhub_lite.losses.reference import LossKeywords, LossOptions, losses_of_logits, reduce_losses
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
    **keywords: Unpack[LossKeywords],
) -> Tensor:
    """Next-token loss of hidden states (batch, seq, D), after the final norm, with labels (batch, seq), -100 ignored.

    With `shift` the state at t is judged by the label at t + 1; without, labels are taken as already shifted.
    `token_weights` is (batch, seq), shifted as the labels are. `choice` is that of `choose_loss`; without one, tiles
    are used wherever they can read the head, and the model's own head where they cannot. Further `keywords` are fields
    of `LossOptions`; soft cap and scale are the head's own.

    Returns a scalar on the head's device, or (batch * kept seq,) for `reduction="none"`.

    Raises:
        ConfigurationError: the choice is "model", which needs the model's logits: see `lm_loss_of_logits`.
    """
    options = LossOptions(reduction=reduction, softcap=head.softcap, logit_scale=head.logit_scale, **keywords)
    if choice is not None and choice.name == "model":
        raise ConfigurationError("The loss 'model' is one of the model's own logits, which hidden states do not give.")
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    device = head.device or hidden.device
    states = hidden.reshape(-1, hidden.shape[-1]).to(device)
    targets = labels.reshape(-1).to(device)
    weights = None if token_weights is None else token_weights.reshape(-1).to(device)
    name = choice.name if choice is not None else "full" if head.unreadable() else "tiled"
    if name in KERNELS:
        return run_kernel(name, states, head, targets, options, weights)
    by_tiles = partial(tiled_cross_entropy, triton=name == OWN_KERNEL)
    if name != "full" and not head.widens:
        return by_tiles(states, head.weight, targets, options, bias=head.bias, token_weights=weights)
    # The head's own module, or A and its dropout, or rows of tokens, only for the tokens that count. Called even if there are none: weights
    # that are split over processes are gathered by all of them or by none.
    valid = targets != options.ignore_index
    index = valid.nonzero().squeeze(1)
    if name == "full":
        losses = losses_of_logits(head.logits(states[index]), targets[index], options)
        everywhere = losses.new_zeros(valid.shape).index_put((index,), losses)
        return reduce_losses(everywhere, valid, reduction, weights)
    widened, extra = head.widened(states[index])
    weights = None if weights is None else weights[index]
    loss = by_tiles(widened, head.weight, targets[index], options, bias=head.bias, token_weights=weights, extra=extra)
    return loss if reduction != "none" else loss.new_zeros(valid.shape).index_put((index,), loss)


def lm_loss_of_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    reduction: str = "sum",
    token_weights: Tensor | None = None,
    **keywords: Unpack[LossKeywords],
) -> Tensor:
    """`causal_lm_loss` of logits (batch, seq, V) as the model returns them, where its head is not understood."""
    options = LossOptions(reduction=reduction, **keywords)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    targets = labels.reshape(-1).to(logits.device)
    weights = None if token_weights is None else token_weights.reshape(-1).to(logits.device)
    losses = losses_of_logits(logits.flatten(0, 1), targets, options)
    return reduce_losses(losses, targets != options.ignore_index, reduction, weights)
