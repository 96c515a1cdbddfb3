"""Which of the faster ways a model can take, each decided by trying it, and each with its reason. Knows PEFT models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.segments import SEGMENTED, Segments

# Any fourth dimension tells transformers that the mask is made already; segments take its place.
NO_MASK_SHAPE = (1, 1, 1, 1)


@dataclass(frozen=True)
class PackingChoice:
    """Whether batches are laid out without padding, and why (not)."""

    packs: bool
    reason: str


def choose_packing(model: Any, args: AdapterTrainingArguments) -> PackingChoice:
    """Decide whether `model` can take rows end to end; where it can, its attention is set to respect their borders.

    Two short rows are run together and alone: the same states must come out.
    """
    inner = model.get_base_model()
    reasons = {
        "padding_free=False": not args.padding_free,
        "torch_compile traces batches of one shape": args.torch_compile,
        "NEFTune scales its noise by the padded length": args.neftune_noise_alpha is not None,
        f"{type(inner).__name__} does not pass segments to its attention": not inner._supports_attention_backend,
        f"its attention is {inner.config._attn_implementation}, not sdpa": _attention(inner) not in ("sdpa", SEGMENTED),
        "it has other than full attention": _has_special_attention(inner.config.get_text_config()),
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


def _has_special_attention(config: Any) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return kinds != {"full_attention"} or softcap is not None or window is not None


@torch.no_grad()
def _keeps_rows_apart(model: Any) -> bool:
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.arange(7, device=device) % vocabulary, torch.arange(20, 9, -1, device=device) % vocabulary]
    decoder = model.get_base_model().get_decoder()
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])[None]
    together = decoder(**segment_inputs({"input_ids": torch.cat(rows)[None], "position_ids": positions}))[0][0]
    alone = torch.cat([decoder(input_ids=row[None])[0][0] for row in rows])
    model.train(was_training)
    distance = (together - alone).float().norm() / alone.float().norm().clamp(min=1e-9)
    # In bf16 two orders of the same sums differ by about one part in a hundred after thirty layers.
    return bool(distance < (1e-4 if together.dtype == torch.float32 else 5e-2))
