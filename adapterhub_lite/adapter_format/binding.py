"""The tensors of a LoRA as PEFT writes them, and the modules of a base that they belong to.

Binding needs the headers of both files alone. Torch is imported where values are read, and only there.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.changes import (
    DORA_MAGNITUDE,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_A,
    LORA_B,
    LORA_BIAS,
    TOKENS,
    Structure,
    Target,
    is_saved,
    module_and_part,
    ranks_of,
    targets_of,
)
from adapterhub_lite.adapter_format.lora_config import (
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

# What an adapter changes besides linear layers, in the words of its record.
ALSO = {
    "embedding": "embeddings", "parameter": "parameters", "saved": "whole modules", "tokens": "rows of tokens",
}  # fmt: skip
HALVES = frozenset({LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B})
TAKEN_DTYPES = frozenset({"F32", "F16", "BF16"})
SHOWN = 3


@dataclass
class LoraPair:
    """The tensors of one module of the base, by their part of the name (`lora_A.weight`, ...)."""

    module: str
    parts: dict[str, TensorEntry] = field(default_factory=dict)


def lora_pairs(
    entries: Iterable[TensorEntry], config: LoraConfigFile | None = None
) -> tuple[dict[str, LoraPair], list[str]]:
    """Group the tensors of an adapter by module; returns them with the problems of single tensors.

    A whole parameter that `config` says is saved stands alone, under its own name and with the part "".
    """
    pairs: dict[str, LoraPair] = {}
    strangers, untyped = [], []
    for entry in entries:
        saved = is_saved(entry.name, config.saved_modules) if config else None
        found = (saved, "") if saved else module_and_part(entry.name)
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
    """Read the (validated) weights of a LoRA, a file or its bytes: module -> pair, in the dtype of the file.

    What else an adapter may change is left out; `changes.read_changes` has all of it.
    """
    from safetensors.torch import load

    # Not by safe_open: safetensors 0.8 never gives back 60 bytes of each tensor got so, which adds up in a server.
    content = weights if isinstance(weights, bytes) else weights.read_bytes()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load(content).items():
        if found := module_and_part(name):
            parts.setdefault(found[0], {})[found[1]] = tensor
    return {
        module: Pair(own[LORA_A], own[LORA_B], scaling_of(module), own.get(DORA_MAGNITUDE))
        for module, own in parts.items()
        if LORA_A in own
    }


Modules = Mapping[str, tuple[int, ...]]


@dataclass
class Binding:
    """An adapter on its base: the configuration without patterns and the record, unless `problems` left nothing.

    `rows` are those of tokens, of the base and, where it `brings_tokens`, its own; None where that is not known.
    """

    config: LoraConfigFile
    lora: LoraRecord | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int | None = None
    brings_tokens: bool = False


def bind(
    config: LoraConfigFile,
    entries: Iterable[TensorEntry],
    modules: Modules | None,
    structure: Structure | None = None,
) -> Binding:
    """Match an adapter with its base: `structure`, or what its files say of linear layers (`modules`: name -> shape).

    Without either (the base is not at hand) shapes alone are checked.
    """
    groups, problems = lora_pairs(entries, config)
    found = Binding(config, problems=problems)
    pairs = {module for module, group in groups.items() if group.parts.keys() & HALVES}
    try:
        if structure is None:
            structure = _structure_of(named_as(pairs, modules) if modules is not None else None, groups, config)
        targets = targets_of(config, structure, pairs)
        paired = [target.module for target in targets if target.kind in ("pair", "embedding")]
        named_alone = [target.key for target in targets if target.kind == "parameter"]
        found.config = config.resolved(
            (module for module in paired if module in groups), structure.matrices, also=named_alone
        )
        ranks = ranks_of(found.config, targets)
        keys = [target.key for target in targets]
        for kind, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            if idle := [pattern for pattern in patterns if not values_for({pattern: 1}, keys)]:
                found.notes.append(f"{kind} names no adapted module with {some(idle)}, which changes nothing")
    except PatternError as error:
        problems.append(f"adapter_config.json: {error}")
        return found
    problems += _module_problems(targets, structure)
    wrong = [
        f"{target.holder}: {reason}"
        for target in targets
        if target.holder in groups
        for reason in _target_problems(target, groups[target.holder], ranks[target], config, structure)
    ]
    grown = {} if wrong else _rows_with_new(targets, groups)
    wrong += _token_problems(targets, grown, structure)
    known = structure.shape_of(f"{structure.embedding}.weight") or structure.shape_of("lm_head.weight")
    found.brings_tokens = bool(grown)
    found.rows = max(grown.values()) if grown else known[0] if known else None
    if wrong:
        problems.append(f"{len(wrong)} shapes are wrong: {some(wrong)}")
    wanted = {target.holder for target in targets}
    bound = wanted & groups.keys()
    problems += _holder_problems([target.holder for target in targets], groups.keys())
    if bound:
        also = sorted({ALSO[target.kind] for target in targets if target.kind in ALSO})
        found.lora = _record(found.config, bound=len(bound), total=len(wanted), also=tuple(also))
    else:
        problems.append(f"no tensor binds to any module of the base (0 of {len(wanted)} modules)")
    return found


def _module_problems(targets: Sequence[Target], structure: Structure) -> list[str]:
    """What is wrong with the modules that are changed, whatever the tensors are."""
    problems = []
    if structure.linear is not None:
        more = [one.module for one in targets if one.kind == "pair" and one.module not in structure.linear]
        if more:
            problems.append(
                f"{some(more)}: no linear layer, or one that gives more than a product, or whose weight is read without calling "
                "it, so that a LoRA on it fails or has no effect; name target_modules without it"
            )
    biased = structure.head if structure.shape_of(f"{structure.head}.bias") else None
    if any(one.kind == "tokens" and biased and biased in (one.module, one.also_head) for one in targets):
        problems.append(
            f"{biased}: PEFT leaves its bias out of the logits where rows of it are trained, so that all of them change; "
            "name it in modules_to_save, or train the rows of the embedding alone"
        )
    heads = {target.also_head for target in targets} & {target.module for target in targets}
    if heads:
        problems.append(
            f"{some(sorted(filter(None, heads)))}: its rows change with those of the embedding, which it shares, and are "
            "changed by themselves too; leave one of the two out"
        )
    return problems


def _holder_problems(wanted: Sequence[str], found: Collection[str]) -> list[str]:
    """What is wrong with the places that have tensors, and those that have to."""
    problems = []
    holders, there = set(wanted), set(found)
    if len(holders) < len(wanted):
        twice = sorted(holder for holder in holders if wanted.count(holder) > 1)
        problems.append(f"{some(twice)}: named twice, as modules and as parameters or tokens; name each once")
    if missing := sorted(holders - there):
        bound = len(holders & there)
        problems.append(f"{bound} of {len(holders)} modules are bound; no tensors for {some(missing)}")
    if over := sorted(there - holders):
        problems.append(f"{len(over)} modules have tensors but are not targeted in the base: {some(over)}")
    return problems


def beyond_files(config: LoraConfigFile, entries: Iterable[TensorEntry], modules: Modules) -> bool:
    """Whether the names and shapes in a base's files do not say what an adapter changes: its model has to be asked."""
    found = [parts for entry in entries if (parts := module_and_part(entry.name))]
    return config.beyond_pairs or any(
        # A name that the files lack may be the model's own for a layer, or that of another model.
        part == EMBEDDING_A or module not in modules or not LINEAR.search(module)
        for module, part in found
    )


# Linear layers wherever they are called so. What else has a matrix may be a router, an expert, which is one only in the files,
# or read without being called.
LINEAR = re.compile(r"^(?!.*\bexperts\b).*\b(q|k|v|o|qkv|gate|up|down|gate_up)_proj$")


def _structure_of(known: Modules | None, groups: Mapping[str, LoraPair], config: LoraConfigFile) -> Structure:
    """What can be said of a base from the names and shapes in its files; without them, what the adapter says itself."""
    embeddings = frozenset(module for module, group in groups.items() if EMBEDDING_A in group.parts)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in (known or {}).items()}
    if known is None:
        for module, group in groups.items():
            parts = {part: entry.shape for part, entry in group.parts.items()}
            if "" in parts:
                shapes[module] = parts[""]
                continue
            down, up = parts.get(LORA_A) or parts.get(EMBEDDING_A), parts.get(LORA_B) or parts.get(EMBEDDING_B)
            if down and up and len(down) == len(up) == 2:
                delta = (down[1], up[0]) if module in embeddings else (up[0], down[1])
                shapes[f"{module}.weight"] = tuple(reversed(delta)) if config.fan_in_fan_out else delta
            elif parts.keys() & HALVES:
                shapes[f"{module}.weight"] = (0, 0)  # of half a pair nothing can be told, and that is said
    transposed = frozenset(name.removesuffix(".weight") for name in shapes) if config.fan_in_fan_out else frozenset()
    return Structure(shapes, embeddings=embeddings, transposed=transposed)


def problems_of_untrained(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None,
    structure: Structure,
    rows: int | None = None,
) -> list[str]:
    """Why an adapter with this configuration (as PEFT writes it) could not be kept, or neither served nor merged.

    `shapes` are those of the tensors that it will be saved as, by name; None where they cannot be known yet. `rows` are
    those of the embedding that it is trained on, where they may be more than the base's: all have to be kept.
    """
    try:
        content = json.dumps(
            dict(config), default=lambda value: sorted(value) if isinstance(value, set) else str(value)
        )
        found = examine_lora_config(content.encode()).config
    except ConfigProblems as error:
        return error.problems
    if shapes is None:
        return []
    entries = [TensorEntry(name, "F32", shape, 0, 0) for name, shape in shapes.items()]
    bound = bind(found, entries, None, structure)
    if not bound.problems and rows is not None and bound.rows is not None and rows > bound.rows:
        return [
            f"the embedding was resized to {rows} rows, and of those the base and the adapter keep {bound.rows}: name the "
            "new tokens in trainable_token_indices (of embedding and head, where these are two matrices), or both modules "
            "in modules_to_save"
        ]
    return bound.problems


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


def _target_problems(
    target: Target, group: LoraPair, rank: int, config: LoraConfigFile, structure: Structure
) -> list[str]:
    wanted = target.parts(config)
    if target.kind == "embedding" and config.use_dora:
        return ["DoRA on an embedding is not kept: take it out of target_modules, or train without DoRA"]
    if set(group.parts) != wanted:
        return [f"wanted {sorted(wanted)}, found {sorted(group.parts)}"]
    shapes = {part: entry.shape for part, entry in group.parts.items()}
    if target.kind == "saved":
        if target.shape in (None, shapes[""]) or _grown(shapes[""], target, structure):
            return []
        return [_resized(shapes[""], target)]
    if target.kind == "tokens":
        width = target.shape[1] if target.shape else shapes[TOKENS][-1]
        if shapes[TOKENS] != (len(target.tokens), width):
            return [f"{len(target.tokens)} tokens of {width} numbers are named, the tensor is {list(shapes[TOKENS])}"]
        return []
    down, up = (EMBEDDING_A, EMBEDDING_B) if target.kind == "embedding" else (LORA_A, LORA_B)
    a, b = shapes[down], shapes[up]
    if target.kind == "parameter":
        return _parameter_problems(target, a, b, rank)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return [f"the configuration says rank {rank}, the tensors are A {list(a)} and B {list(b)}"]
    if 0 in a or 0 in b:
        return [f"empty tensors, A {list(a)} and B {list(b)}"]
    delta = (a[1], b[0]) if target.kind == "embedding" else (b[0], a[1])
    stored = tuple(reversed(delta)) if target.transposed else delta
    if target.shape is not None and stored != target.shape:
        return [f"the change is {list(stored)}, the base's weight {list(target.shape)}"]
    one_a_row = [part for part in (LORA_BIAS, DORA_MAGNITUDE) if part in shapes]
    return [f"{part} is {list(shapes[part])}" for part in one_a_row if shapes[part] != (b[0],)]


def _grown(found: tuple[int, ...], target: Target, structure: Structure) -> bool:
    """Whether a whole embedding or head only has more rows than the base's, those of tokens of the adapter's own."""
    known = target.shape or ()
    ends = target.module in {structure.embedding, structure.head} - {None}
    return ends and bool(known) and len(found) == len(known) and found[1:] == known[1:] and found[0] > known[0]


def _resized(found: tuple[int, ...], target: Target) -> str:
    known = list(target.shape or ())
    if len(found) == len(known) and list(found[1:]) == known[1:] and found[0] < known[0]:
        return (
            f"it is {list(found)}, the base's {known}: resizing took rows away. The base has rows for more tokens than its "
            "tokenizer; train without resizing it, with the new tokens in trainable_token_indices"
        )
    return f"it is {list(found)}, the base's {known}"


def _rows_with_new(targets: Sequence[Target], groups: Mapping[str, LoraPair]) -> dict[str, int]:
    """The parameters that get rows of tokens which the base has not -> their rows then."""
    rows: dict[str, int] = {}
    for target in targets:
        if target.shape is None or target.holder not in groups:
            continue
        base = target.shape[0] if target.shape else 0
        if target.kind == "saved":
            shape = groups[target.holder].parts[""].shape
            found = shape[0] if shape else base
        else:
            found = max((base, *(token + 1 for token in target.tokens)))
        if found > base:
            rows[target.parameter] = found
            if target.also_head:
                rows[f"{target.also_head}.weight"] = found
    return rows


def _token_problems(targets: Sequence[Target], rows: Mapping[str, int], structure: Structure) -> list[str]:
    """What is wrong with rows of new tokens: they have to be there, all of them, in all that has a row per token."""
    if not rows:
        return []
    most, here = max(rows.values()), some(sorted(rows))
    for target in targets:
        base = target.shape[0] if target.shape else 0
        if target.new_tokens and sorted(target.new_tokens) != list(range(base, most)):
            return [f"{here}: of the tokens {base} to {most - 1}, which the base has not, some have no row"]
    ends = [one for one in (structure.embedding, structure.head) if one]
    each = {name for one in ends for name in (f"{one}.weight", f"{one}.bias") if structure.shape_of(name)}
    if left := sorted(name for name in each if rows.get(name) != most):
        return [
            f"{here} has rows of {most} tokens and {some(left)} has not; name both modules in modules_to_save, or in "
            "trainable_token_indices"
        ]
    others = sorted(name for name in structure.embeddings - set(ends) if "per_layer" in name)
    return [f"{others[0]} has a row per token too, which no adapter brings"] if others else []


def _parameter_problems(target: Target, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> list[str]:
    shape = target.shape or ()
    if len(shape) not in (2, 3):
        return [f"{target.parameter} has {len(shape)} dimensions, and 2 or 3 take a LoRA"]
    experts = shape[0] if len(shape) == 3 else 1
    outs, ins = (shape[-1], shape[-2]) if target.transposed and len(shape) == 3 else (shape[-2], shape[-1])
    wanted = (rank * experts, ins), (outs, rank * experts)
    return (
        [] if (a, b) == wanted else [f"the tensors are A {list(a)} and B {list(b)}, wanted {wanted[0]} and {wanted[1]}"]
    )


def _record(config: LoraConfigFile, *, bound: int, total: int, also: tuple[str, ...]) -> LoraRecord:
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
        also=also,
    )
