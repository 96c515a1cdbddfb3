"""What would be refused of an adapter once it is trained, found before its first step by the code that refuses it then."""

import json
from collections.abc import Mapping
from typing import Any

from adapterhub_lite.adapter_format.binding import Modules, bind
from adapterhub_lite.adapter_format.lora_config import ConfigProblems, examine_lora_config
from adapterhub_lite.adapter_format.safetensors_header import TensorEntry


def problems_of_untrained(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None, modules: Modules, *, tied_head: bool
) -> list[str]:
    """Why an adapter with this configuration (as PEFT writes it) could not be kept, or neither served nor merged.

    `shapes` are those of the tensors that it will be saved as, by name; None where they cannot be known yet. `modules`
    are the base's; `tied_head` says that its head shares the embedding's weight.
    """
    try:
        content = json.dumps(
            dict(config), default=lambda value: sorted(value) if isinstance(value, set) else str(value)
        )
        found = examine_lora_config(content.encode()).config
    except ConfigProblems as error:
        return error.problems
    problems = []
    if found.lora_bias:
        problems.append("lora_bias=True trains biases that no server and no merge has a place for")
    if shapes is None:
        return problems
    entries = [TensorEntry(name, "F32", shape, 0, 0) for name, shape in shapes.items()]
    binding = bind(found, entries, modules)
    problems += binding.problems
    if tied_head and any(name.endswith("lm_head.lora_A.weight") for name in shapes):
        problems.append(
            "lm_head shares its weight with the embedding: an adapter of it is neither served nor merged; take it out of "
            "target_modules, or untie the base first"
        )
    return problems
