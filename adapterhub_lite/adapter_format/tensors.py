"""The tensors of a LoRA as PEFT writes them: their names, grouped by the module they change, and their values.

Torch is imported where values are read, and only there.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_lite.adapter_format.safetensors_header import TensorEntry

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
LORA_BIAS, DORA_MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
TENSOR_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)"
)
TAKEN_DTYPES = frozenset({"F32", "F16", "BF16"})
SHOWN = 3


@dataclass
class LoraPair:
    """The tensors of one module of the base, by their part of the name (`lora_A.weight`, ...)."""

    module: str
    parts: dict[str, TensorEntry] = field(default_factory=dict)


def tensor_name(module: str, part: str) -> str:
    """The name in a PEFT file of one part (`LORA_A`, ...) of the pair on `module`."""
    return f"{PREFIX}{module}.{part}"


def module_and_part(name: str) -> tuple[str, str] | None:
    """The module that a tensor belongs to and which part of its pair it is; None where it is no LoRA weight."""
    match = TENSOR_NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def lora_pairs(entries: Iterable[TensorEntry]) -> tuple[dict[str, LoraPair], list[str]]:
    """Group the tensors of an adapter by module; returns them with the problems of single tensors."""
    pairs: dict[str, LoraPair] = {}
    strangers, untyped = [], []
    for entry in entries:
        found = module_and_part(entry.name)
        if found is None:
            strangers.append(entry.name)
            continue
        if entry.dtype not in TAKEN_DTYPES:
            untyped.append(f"{entry.name} in {entry.dtype}")
        module, part = found
        pairs.setdefault(module, LoraPair(module)).parts[part] = entry
    problems = []
    if strangers:
        problems.append(f"{len(strangers)} tensors are not LoRA weights: {some(strangers)}")
    if untyped:
        problems.append(f"{len(untyped)} tensors are not in F32, F16 or BF16: {some(untyped)}")
    return pairs, problems


def some(items: list[str]) -> str:
    """The first few of `items` and how many more there are, each cut to a bearable length."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(f"{item:.120}" for item in items[:SHOWN]) + more


@dataclass(frozen=True)
class Pair:
    """One module's LoRA as it is stored: `a` (rank, in), `b` (out, rank); the change is scaling * b @ a.

    `magnitude` (out,) is that of a DoRA, None of a plain LoRA.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    scaling: float
    magnitude: "torch.Tensor | None" = None


def read_pairs(weights: Path | bytes, scaling_of: Callable[[str], float]) -> dict[str, Pair]:
    """Read the (validated) weights of a LoRA, a file or its bytes: module -> pair, in the dtype of the file."""
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
