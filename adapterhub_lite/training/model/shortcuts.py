"""Which of the faster ways a model can take, each decided by trying it, and each with its reason. Knows PEFT models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.memory.tracing import has_special_attention
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import splits_weights
from adapterhub_lite.training.model.segments import SEGMENTED, Segments

# Any fourth dimension tells transformers that the mask is made already; segments take its place.
NO_MASK_SHAPE = (1, 1, 1, 1)


@dataclass(frozen=True)
class PackingChoice:
    """Whether batches are laid out without padding, and why (not)."""

    packs: bool
    reason: str


def choose_packing(model: Any, args: AdapterTrainingArguments) -> PackingChoice:
    """Decide whether `model` can take rows end to end; where it can, its attention is set to respect their borders.

    A short row is run beside one neighbour, beside another, and alone: its states must be the same.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    reasons = {
        "padding_free=False": not args.padding_free,
        "torch_compile traces batches of one shape": args.torch_compile,
        "the engine splits the weights before it can be tried": splits_weights(args),
        "NEFTune scales its noise by the padded length": args.neftune_noise_alpha is not None,
        f"{type(inner).__name__} does not pass segments to its attention": not inner._supports_attention_backend,
        f"its attention is {inner.config._attn_implementation}, not sdpa": _attention(inner) not in ("sdpa", SEGMENTED),
        "it has other than full attention": has_special_attention(inner.config.get_text_config()),
    }
    for reason, applies in reasons.items():
        if applies:
            return PackingChoice(False, f"padded: {reason}")
    before = _attention(inner)
    inner.set_attn_implementation(SEGMENTED)
    if not _keeps_rows_apart(model):
        inner.set_attn_implementation(before)
        return PackingChoice(False, "padded: rows laid end to end did not give the states that they give alone")
    return PackingChoice(True, "rows end to end, checked against rows alone")


def segment_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Add to a packed batch what keeps its rows apart: their segments, and a mask that says no mask is needed."""
    position_ids: Tensor = inputs["position_ids"]
    mask = torch.ones(NO_MASK_SHAPE, device=position_ids.device)
    return {**inputs, "attention_mask": mask, "segments": Segments.of(position_ids)}


def _attention(inner: Any) -> str:
    return str(inner.config._attn_implementation)


@torch.no_grad()
def _keeps_rows_apart(model: Any) -> bool:
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.get_decoder()
    first, other, second = (
        torch.arange(start, start + count, device=device) % vocabulary for start, count in ((5, 7), (40, 7), (60, 11))
    )
    positions = torch.cat([torch.arange(7, device=device), torch.arange(11, device=device)])[None]

    def states(neighbour: Tensor) -> Tensor:
        ids = torch.cat([neighbour, second])[None]
        hidden: Tensor = decoder(**segment_inputs({"input_ids": ids, "position_ids": positions}))[0]
        return hidden[0, 7:].float()

    alone = decoder(input_ids=second[None])[0][0].float()
    beside, beside_other = states(first), states(other)
    model.train(was_training)
    scale = alone.norm().clamp(min=1e-9)
    # Beside another neighbour every product has the same shape, so that nothing may change; alone, kernels may round
    # otherwise, and in bf16 that grows over the layers.
    return bool((beside - beside_other).norm() <= 1e-4 * scale and (beside - alone).norm() <= 0.2 * scale)
