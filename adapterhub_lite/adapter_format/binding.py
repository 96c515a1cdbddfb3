"""Which tensors of an adapter belong to which modules of a base, from the headers of both files alone."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterhub_lite.adapter_format.lora_config import ALL_LINEAR, ConfigProblems, LoraConfigFile, examine_lora_config
from adapterhub_lite.adapter_format.manifest import LoraRecord
from adapterhub_lite.adapter_format.patterns import PatternError, values_for
from adapterhub_lite.adapter_format.safetensors_header import TensorEntry
from adapterhub_lite.adapter_format.tensors import (
    DORA_MAGNITUDE,
    LORA_A,
    LORA_B,
    LORA_BIAS,
    LoraPair,
    lora_pairs,
    some,
)

Modules = Mapping[str, tuple[int, ...]]


@dataclass
class Binding:
    """An adapter on its base: the configuration without patterns and the record, unless `problems` left nothing."""

    config: LoraConfigFile
    lora: LoraRecord | None = None
    problems: list[str] = field(default_factory=list)


def bind(config: LoraConfigFile, entries: Iterable[TensorEntry], modules: Modules | None) -> Binding:
    """Match an adapter with the modules of its base (name -> shape of the weight).

    Without `modules` (the base is not at hand) shapes alone are checked.
    """
    pairs, problems = lora_pairs(entries)
    found = Binding(config, problems=problems)
    known = None if modules is None else named_as(pairs, modules)
    try:
        if known is None or config.target_modules == ALL_LINEAR:
            # Which matrices are those of linear layers stands in no header; what has a pair is one.
            wanted = {module for module in pairs if known is None or module in known}
        else:
            wanted = config.targets(known)
        found.config = config.resolved(pairs, known or ())
        ranks = values_for(found.config.rank_pattern, pairs)
    except PatternError as error:
        problems.append(f"adapter_config.json: {error}")
        return found
    wrong = [
        f"{module}: {reason}"
        for module, pair in pairs.items()
        for reason in _pair_problems(config, pair, ranks.get(module, config.r), known.get(module) if known else None)
    ]
    if wrong:
        problems.append(f"{len(wrong)} shapes are wrong: {some(wrong)}")
    bound = wanted & pairs.keys()
    if missing := sorted(wanted - bound):
        problems.append(f"{len(bound)} of {len(wanted)} modules are bound; no tensors for {some(missing)}")
    if over := sorted(pairs.keys() - wanted):
        problems.append(f"{len(over)} modules have tensors but are not targeted in the base: {some(over)}")
    if bound:
        found.lora = _record(found.config, bound=len(bound), total=len(wanted))
    else:
        problems.append(f"no tensor binds to any module of the base (0 of {len(wanted)} modules)")
    return found


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


def named_as(pairs: Collection[str], modules: Modules) -> Modules:
    """The modules of a base under the names that an adapter has for them.

    Some checkpoints leave out the first part (`transformer.`, `model.`), which the model and its adapters have.
    """
    prefix = next((m.partition(".")[0] for m in pairs if m not in modules and name_in_base(m, modules)), None)
    if prefix is None:
        return modules
    return {name if name in pairs or name == "lm_head" else f"{prefix}.{name}": s for name, s in modules.items()}


def name_in_base(module: str, modules: Modules) -> str | None:
    """The base's own name of `module`, which may lack its first part; None where the base has no such module."""
    if module in modules:
        return module
    shorter = module.partition(".")[2]
    return shorter if shorter in modules else None


def _pair_problems(config: LoraConfigFile, pair: LoraPair, rank: int, weight: tuple[int, ...] | None) -> list[str]:
    wanted = {LORA_A, LORA_B}
    wanted |= {LORA_BIAS} if config.lora_bias else set()
    wanted |= {DORA_MAGNITUDE} if config.use_dora else set()
    if set(pair.parts) != wanted:
        return [f"wanted {sorted(wanted)}, found {sorted(pair.parts)}"]
    a, b = pair.parts[LORA_A].shape, pair.parts[LORA_B].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return [f"the configuration says rank {rank}, the tensors are A {list(a)} and B {list(b)}"]
    if 0 in a or 0 in b:
        return [f"empty tensors, A {list(a)} and B {list(b)}"]
    delta = (b[0], a[1])
    stored = tuple(reversed(delta)) if config.fan_in_fan_out else delta
    if weight is not None and stored != weight:
        return [f"the change is {list(stored)}, the base's weight {list(weight)}"]
    one_a_row = [part for part in (LORA_BIAS, DORA_MAGNITUDE) if part in pair.parts]
    return [f"{part} is {list(pair.parts[part].shape)}" for part in one_a_row if pair.parts[part].shape != (b[0],)]


def _record(config: LoraConfigFile, *, bound: int, total: int) -> LoraRecord:
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return LoraRecord(
        rank=config.r,
        alpha=float(config.lora_alpha),
        scaling=float(config.lora_alpha) / (config.r**0.5 if config.use_rslora else config.r),
        target_modules=tuple(sorted(set(targets))),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern={key: float(value) for key, value in config.alpha_pattern.items()},
        modules_bound=bound,
        modules_total=total,
    )
