"""The weights of an adapter in memory, by module: the only reader of its tensors. Torch on use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_lite.adapter_format.tensor_names import DORA_MAGNITUDE, LORA_A, LORA_B, module_and_part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pair:
    """One module's LoRA as it is stored: `a` (rank, in), `b` (out, rank); the change is scaling * b @ a.

    `magnitude` (out,) is a DoRA's, else None.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float
    magnitude: "torch.Tensor | None" = None


def read_pairs(weights: Path | bytes, scaling_of: Callable[[str], float]) -> dict[str, Pair]:
    """Read the (validated) weights of a LoRA or DoRA without biases, a file or its bytes: module -> pair, in the dtype of the file."""
    from safetensors.torch import load

    # Not by safe_open: safetensors 0.8 never gives back 60 bytes of each tensor got so, which adds up in a server.
    content = weights if isinstance(weights, bytes) else weights.read_bytes()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load(content).items():
        found = module_and_part(name)
        assert found is not None, "the folder was examined"
        parts.setdefault(found[0], {})[found[1]] = tensor
    return {
        module: Pair(own[LORA_A], own[LORA_B], scaling_of(module), own.get(DORA_MAGNITUDE))
        for module, own in parts.items()
    }
