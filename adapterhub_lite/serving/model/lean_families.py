"""Which models the lean passes compute, and the one description of their layers (`bases/layer_parts`)."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from adapterhub_lite.bases.layer_parts import LayerParts, depends_on_length, layer_parts

# Families for which they are held against the model's own forward by the tests; each base is proven besides.
LEAN_FAMILIES = frozenset(
    f"{family}ForCausalLM"
    for family in (
        "Llama", "Granite", "SeedOss", "Mistral", "Qwen2", "SmolLM3", "Phi3", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2",
        "Olmo3",
    )
)  # fmt: skip


def find_parts(model: PreTrainedModel) -> LayerParts | None:
    """The description of a model's layers; None where there is none, or none that all of them share."""
    if type(model).__name__ not in LEAN_FAMILIES or not type(model).__module__.startswith("transformers."):
        return None
    if depends_on_length(model.config):
        return None
    layers: Any = model.model.layers
    found = {layer_parts(layer) for layer in layers}
    parts = found.pop() if len(found) == 1 else None
    if parts is None:
        return None
    linears = [layer.get_submodule(path) for layer in layers for role in parts.roles for path in role]
    # Not a quantised one, nor one of somebody's own.
    plain = all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
    return parts if plain else None


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether there is a description of the model's layers."""
    return find_parts(model) is not None
