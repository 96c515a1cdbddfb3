"""Loads a base as it is to be served: as it was saved, quantised by bitsandbytes, or for the compiled code's own int8 and int4."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from adapterhub_lite import devices
from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.model.compiled.library import compiled
from adapterhub_lite.serving.model.compiled.packed_weights import QUANTISED, Precision
from adapterhub_lite.serving.model.lean_families import can_fuse


def load_for_serving(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, Precision | None]:
    """Load the base in `folder`, and say how the engine is to keep its linear layers; None: as they were loaded.

    `device` None takes a GPU when there is one. On a CPU with a C compiler, "int8" and "int4" are the engine's own for the
    families that it has described; for others "int8" is bitsandbytes', as on a GPU, and so are "nf4" and "fp4".

    Raises:
        ConfigurationError: no such quantisation, or "int4" where the engine's own is not to be had.
    """
    device = device or devices.preferred()
    reason = "it is for a CPU" if device != "cpu" else "there is no C compiler" if compiled() is None else ""
    own = next((one for one in QUANTISED if one == quantization), None)
    if own is not None and not reason:
        model = load_base_model(folder, dtype=dtype, device=device)
        if can_fuse(model) and model.dtype in (torch.float32, torch.bfloat16):
            return model, own
        reason = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} has no compiled pass"
        del model
    if quantization == "int4":
        raise ConfigurationError(f"This base cannot be kept as int4 here: {reason}. Use nf4 or int8.")
    try:
        chosen = Quantization.of(quantization)
    except ValueError as error:
        raise ConfigurationError(f"quantization is {quantization!r}: {error}, and int4 on a CPU.") from None
    config = chosen.bitsandbytes() if chosen else None
    return load_base_model(folder, dtype=dtype, device=device, quantization_config=config), None
