"""Which implementation computes the loss, and why. Knows torch; asks a model only for its head and 8 tokens.

The ladder, best first: the Triton kernels of others and ours, where a GPU and the options allow them and they agree with
our tiles, the full logits where they are so small that nothing is faster, and our tiles, which run everywhere and are the
reference for the others. A head that tiles cannot read is called for its logits ("full"); a model that does more to its
logits than we know of is asked for them ("model").
"""

from dataclasses import dataclass
from typing import Any

import torch

from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.losses.heads import KNOWN_FAMILIES, CausalModel, Head, head_of
from adapterhub_lite.losses.kernels import KERNELS, OWN_KERNEL, refuse_kernel
from adapterhub_lite.losses.reference import LossOptions
from adapterhub_lite.losses.rows import is_zero3, rows_shape

RUNGS = (*KERNELS, OWN_KERNEL, "full", "tiled", "model")
"""The ladder in order, best first; see `refusal`."""

SMALL_LOGITS = 2**18
"""Logits (tokens x vocabulary) up to which the full loss is as fast as tiles; measured on a CPU."""

LOGIT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference between our reading of a head and the model's logits, relative to the largest logit."""


@dataclass(frozen=True)
class LossChoice:
    """The implementation taken (`name`), why, and why not each of the others."""

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def record(self) -> dict[str, str]:
        """As the training record keeps it: `name`, `reason`, and `not <other>` for each rung that was not taken."""
        return {"name": self.name, "reason": self.reason} | {f"not {name}": reason for name, reason in self.rejected}


@dataclass(frozen=True)
class Situation:
    """What a rung is judged by: a head, the largest number of tokens that a step will have, and the options."""

    head: Head
    tokens: int
    options: LossOptions
    mismatch: str | None = None
    partitioned: bool = False

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.device or torch.device("cpu")

    @property
    def unreadable(self) -> str | None:
        """Why nothing but the head's own module can make its logits."""
        if self.partitioned and self.head.trained:
            return "a trained head under ZeRO-3 can only be read inside its module"
        return self.head.unreadable()


def choose_loss(
    model: CausalModel,
    *,
    tokens: int,
    options: LossOptions | None = None,
    prefer: str = "auto",
    head: Head | None = None,
    partitioned: bool = False,
) -> LossChoice:
    """Choose how the loss of `model` is computed when a step has up to `tokens` tokens.

    A head of an unknown family, or of custom code, is compared once with the model's own logits on 8 tokens. When they
    differ, nothing that is computed from hidden states and head can be right, and the choice is "model": the loss of the
    logits it returns. `partitioned` says that ZeRO-3 will hold what is trained in parts,
    even where it does not yet.

    Raises:
        ConfigurationError: `prefer` names an implementation that cannot run here; the text gives the reason.
        UnknownNameError: `prefer` is no implementation.
    """
    head = head or head_of(model)
    # The tests cover a known family in transformers' own code: a custom class may compute anything.
    tested = head.family in KNOWN_FAMILIES and type(_inner(model)).__module__.startswith("transformers.models.")
    mismatch = None if tested else head_mismatch(model, head)
    situation = Situation(head, tokens, options or LossOptions(), mismatch, partitioned)
    if prefer != "auto":
        if prefer not in RUNGS:
            raise UnknownNameError.among("loss implementation", prefer, ["auto", *RUNGS])
        why_not = mismatch if prefer == "full" else refusal(prefer, situation)
        if why_not is not None:
            raise ConfigurationError(f"The loss {prefer!r} cannot be used: {why_not}. Use 'auto' or 'model'.")
        return LossChoice(prefer, "asked for by name")
    rejected: list[tuple[str, str]] = []
    for name in RUNGS:
        why_not = refusal(name, situation)
        if why_not is None:
            return LossChoice(name, _reason(name, situation), tuple(rejected))
        rejected.append((name, why_not))
    raise AssertionError("any model can be asked for its logits")


def _inner(model: Any) -> Any:  # a model of transformers, inside PEFT's wrapper or without one
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_mismatch(model: CausalModel, head: Head) -> str | None:
    """Compare the logits that `head` gives with the model's own on 8 tokens; a sentence when they differ.

    The hidden states are those of the trunk (`base_model`), which is what training hands to the loss.
    """
    inner = _inner(model)
    trunk = inner.base_model
    if trunk is inner:
        return f"{type(inner).__name__} has no trunk apart from its head"
    if any(is_zero3(parameter) for parameter in inner.parameters()):
        return "an unknown head cannot be compared with the model's logits once ZeRO-3 has split the weights"
    table = inner.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=table.device)[None] % min(100, len(table))
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            own = inner(input_ids=ids, use_cache=False).logits[0].float()
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours = head.logits(hidden.to(head.device or hidden.device)).float().to(own.device)
    finally:
        inner.train(training)
    if ours.shape != own.shape:
        return f"the head gives logits {tuple(ours.shape)}, the model {tuple(own.shape)}"
    apart = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
    limit = LOGIT_TOLERANCE.get(hidden.dtype, 0.1)
    if not apart <= limit:
        return f"on 8 tokens the head's logits differ from the model's own by {apart:.3g} of the largest one"
    return None


def refusal(name: str, situation: Situation) -> str | None:
    """Why the implementation `name` is not taken; None to take it."""
    if name == "model":
        return None
    if situation.mismatch is not None:
        return situation.mismatch
    if name == "full":
        if situation.unreadable:
            return None
        count = situation.tokens * rows_shape(situation.head.weight)[0]
        return None if count <= SMALL_LOGITS else f"{count} logits would be held where tiles hold a part"
    if situation.unreadable or name == "tiled":
        return situation.unreadable
    return refuse_kernel(name, situation.head, situation.device, situation.options)


def _reason(name: str, situation: Situation) -> str:
    if name == "model":
        return str(situation.mismatch)
    if name == "full":
        count = situation.tokens * rows_shape(situation.head.weight)[0] if not situation.unreadable else 0
        return situation.unreadable or f"{count} logits are so few that tiles would not be faster"
    if name == "tiled":
        rows = "with the rows of tokens trained" if situation.head.token_rows() else "any device, every option"
        low = "with the LoRA on the head trained" if situation.head.low_rank() else rows
        return f"tiles over the valid tokens: {low}"
    return "its kernel runs on this GPU, covers every option asked for, and agrees with the tiles"
