"""The tensors of a LoRA as PEFT writes them, and the modules of a base that they belong to.

Binding needs the headers of both files alone. Torch is imported where values are read, and only there.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.lora_config import (
    ALL_LINEAR,
    ConfigProblems,
    LoraConfigFile,
    PatternError,
    examine_lora_config,
    values_for,
)
from adapterhub_lite.adapter_format.manifest import LoraRecord
from adapterhub_lite.adapter_format.strict_reading import TensorEntry

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


Modules = Mapping[str, tuple[int, ...]]


@dataclass
class Binding:
    """An adapter on its base: the configuration without patterns and the record, unless `problems` left nothing."""

    config: LoraConfigFile
    lora: LoraRecord | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
        for kind, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            if idle := [pattern for pattern in patterns if not values_for({pattern: 1}, pairs)]:
                found.notes.append(f"{kind} names no adapted module with {some(idle)}, which changes nothing")
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
