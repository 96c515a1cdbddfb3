"""Which implementation computes the loss, and why. Knows torch; asks a model only for its head and 8 tokens.

The ladder, best first: the Triton kernels of others where a GPU and the options allow them, the full logits where they
are so small that nothing is faster, and our tiles, which run everywhere and are the reference for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.losses.heads import KNOWN_FAMILIES, Head, head_of
from adapterhub_lite.losses.options import LossOptions
from adapterhub_lite.losses.rows import is_quantised, is_sharded, is_zero3, rows_shape

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
        """As the training record keeps it: `name`, `reason`, and `not <other>` for each rung that was left out."""
        return {"name": self.name, "reason": self.reason} | {f"not {name}": reason for name, reason in self.rejected}


@dataclass(frozen=True)
class Situation:
    """What a rung is judged by: a head, the largest number of tokens a step will have, and the options."""

    head: Head
    tokens: int
    options: LossOptions
    mismatch: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device


def choose_loss(
    model: Any, *, tokens: int, options: LossOptions | None = None, prefer: str = "auto", head: Head | None = None
) -> LossChoice:
    """Choose how the loss of `model` is computed when a step has up to `tokens` tokens.

    A head of an unknown family is compared once with the model's own logits on 8 tokens; when they differ, the choice
    is the full loss through the model's own head.

    Raises:
        ConfigurationError: `prefer` names an implementation that cannot run here; the text gives the reason.
        UnknownNameError: `prefer` is no implementation.
    """
    head = head or head_of(model)
    mismatch = None if head.family in KNOWN_FAMILIES else head_mismatch(model, head)
    situation = Situation(head, tokens, options or LossOptions(), mismatch)
    if prefer != "auto":
        if prefer not in RUNGS:
            raise UnknownNameError.among("loss implementation", prefer, ["auto", *RUNGS])
        refusal = None if prefer == "full" else RUNGS[prefer](situation)
        if refusal is not None:
            raise ConfigurationError(f"The loss {prefer!r} cannot be used: {refusal}. Use 'auto' or 'full'.")
        return LossChoice(prefer, "asked for by name")
    unread = head.unreadable() or mismatch
    if unread is not None:
        return LossChoice("full", unread, tuple((name, unread) for name in RUNGS if name != "full"))
    rejected: list[tuple[str, str]] = []
    for name, refuse in RUNGS.items():
        refusal = refuse(situation)
        if refusal is None:
            return LossChoice(name, _reason(name, situation), tuple(rejected))
        rejected.append((name, refusal))
    raise AssertionError("tiles read every head that was not sent to the full loss above")


def head_mismatch(model: Any, head: Head) -> str | None:
    """Compare our reading of the head with the model's own logits on 8 tokens; a sentence when they differ.

    The hidden states are those of the trunk (`base_model`), which is what training hands to the loss.
    """
    refusal = head.unreadable()
    if refusal is not None:
        return refusal
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = inner.base_model
    if trunk is inner:
        return f"{type(inner).__name__} has no trunk apart from its head"
    if any(is_zero3(parameter) for parameter in inner.parameters()):
        return "an unknown head cannot be compared with the model's logits once ZeRO-3 has split the weights"
    device = inner.get_input_embeddings().weight.device
    ids = torch.arange(1, 9, device=device)[None] % min(100, rows_shape(head.weight)[0])
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            own = inner(input_ids=ids, use_cache=False).logits[0].float()
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours = head.logits(hidden.to(head.weight.device)).float().to(own.device)
    finally:
        inner.train(training)
    if ours.shape != own.shape:
        return f"the head gives logits {tuple(ours.shape)}, the model {tuple(own.shape)}"
    apart = float((ours - own).abs().max() / own.abs().max().clamp(min=1e-6))
    limit = LOGIT_TOLERANCE.get(hidden.dtype, 0.1)
    if not apart <= limit:
        return f"on 8 tokens the head's logits differ from the model's own by {apart:.3g} of the largest one"
    return None


def _reason(name: str, situation: Situation) -> str:
    if name == "full":
        count = situation.tokens * rows_shape(situation.head.weight)[0]
        return f"{count} logits are so few that tiles would not be faster"
    if name == "tiled":
        low = "with the LoRA on the head trained" if situation.head.low_rank() else "any device, every option"
        return f"tiles over the valid tokens: {low}"
    return "its kernel runs on this GPU and covers every option asked for"


def _refuse_small(situation: Situation) -> str | None:
    count = situation.tokens * rows_shape(situation.head.weight)[0]
    return None if count <= SMALL_LOGITS else f"{count} logits would be held where tiles hold a part"


def _refuse_tiled(situation: Situation) -> str | None:
    return situation.head.unreadable() or situation.mismatch


def _refuse_kernel(package: str, attribute: str) -> Callable[[Situation], str | None]:
    def refuse(situation: Situation) -> str | None:
        head, options = situation.head, situation.options
        unread = _refuse_tiled(situation)
        if unread is not None:
            return unread
        if situation.device.type != "cuda":
            return f"its kernels need a GPU, and the head is on {situation.device.type}"
        if package == "cut_cross_entropy" and torch.cuda.get_device_capability(situation.device) < (8, 0):
            return "its kernels need compute capability 8.0 or newer"
        if head.low_rank():
            return "it would leave the LoRA on the head untrained"
        if is_quantised(head.weight) or is_sharded(head.weight) or is_zero3(head.weight):
            return "it reads only a plain weight"
        asked = {"a bias": head.bias is not None, "label smoothing": options.label_smoothing, "z-loss": options.z_loss}
        unsupported = [name for name, wanted in asked.items() if wanted]
        if head.logit_scale != 1.0:
            unsupported.append("a logit scale")
        if unsupported:
            return f"not used together with {', '.join(unsupported)}"
        if head.weight.dtype == torch.float16:
            return "its gradients are made before a gradient scaler's factor is known"
        try:
            getattr(import_module(package), attribute)
        except (ImportError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    return refuse


RUNGS: dict[str, Callable[[Situation], str | None]] = {
    "cut_cross_entropy": _refuse_kernel("cut_cross_entropy", "linear_cross_entropy"),
    "liger": _refuse_kernel("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
    "full": _refuse_small,
    "tiled": _refuse_tiled,
}
"""The ladder in order: name -> a function that gives the reason for refusing it, or None to take it."""


def run_kernel(
    name: str, hidden: Tensor, head: Head, targets: Tensor, options: LossOptions, token_weights: Tensor | None
) -> Tensor:
    """The losses of a Triton rung, reduced as `options` say. hidden (N, D), targets (N,).

    Raises:
        ImportError: the package is gone since the choice was made.
    """
    from adapterhub_lite.losses.reference import reduce_losses

    ignore, softcap = options.ignore_index, head.softcap
    if name == "cut_cross_entropy":
        cce = import_module("cut_cross_entropy").linear_cross_entropy
        losses = cce(hidden, head.weight, targets, ignore_index=ignore, softcap=softcap, reduction="none")
    else:
        liger = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
        losses = liger(ignore_index=ignore, softcap=softcap, reduction="none")(head.weight, hidden, targets)
    return reduce_losses(losses.float(), targets != ignore, options.reduction, token_weights)
