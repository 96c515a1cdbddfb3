"""Which tensors of an adapter belong to which modules of a base, from the headers of both files alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adapterhub_lite.adapter_format.lora_config import LoraConfigFile
from adapterhub_lite.adapter_format.manifest import LoraRecord
from adapterhub_lite.adapter_format.safetensors_header import TensorEntry, read_tensor_entries

TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)"
)
TAKEN_DTYPES = frozenset({"F32", "F16", "BF16"})
MAX_BASE_HEADER_BYTES = 64 << 20
SHOWN = 3

Modules = Mapping[str, tuple[int, ...]]


def base_modules(folder: Path) -> Modules:
    """The modules of the base in `folder` that hold a matrix: dotted name -> shape of its weight.

    A head that shares the embedding's weight is listed as `lm_head` though no file holds it.
    """
    files = sorted(folder.glob("*.safetensors"))
    stamp = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _base_modules(stamp)


@lru_cache(maxsize=8)
def _base_modules(stamp: tuple[tuple[Path, int, int], ...]) -> Modules:
    found: dict[str, tuple[int, ...]] = {}
    for path, _, _ in stamp:
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES):
            if entry.name.endswith(".weight") and len(entry.shape) == 2:
                found[entry.name.removesuffix(".weight")] = entry.shape
    embedding = next((shape for name, shape in found.items() if re.search(r"(^|\.)(embed_tokens|wte)$", name)), None)
    if embedding and not any(name.endswith("lm_head") for name in found):
        found["lm_head"] = embedding
    return found


@dataclass
class LoraPair:
    """The tensors of one module of the base, by their part of the name (`lora_A.weight`, ...)."""

    module: str
    parts: dict[str, TensorEntry]


def lora_pairs(entries: list[TensorEntry]) -> tuple[dict[str, LoraPair], list[str]]:
    """Group the tensors of an adapter by module; returns them with the problems of single tensors."""
    pairs: dict[str, LoraPair] = {}
    strangers, untyped = [], []
    for entry in entries:
        match = TENSOR_NAME.fullmatch(entry.name)
        if not match:
            strangers.append(entry.name)
            continue
        if entry.dtype not in TAKEN_DTYPES:
            untyped.append(f"{entry.name} in {entry.dtype}")
        pairs.setdefault(match["module"], LoraPair(match["module"], {})).parts[match["part"]] = entry
    problems = []
    if strangers:
        problems.append(f"{len(strangers)} tensors are not LoRA weights: {_some(strangers)}")
    if untyped:
        problems.append(f"{len(untyped)} tensors are not in F32, F16 or BF16: {_some(untyped)}")
    return pairs, problems


def bind(
    config: LoraConfigFile, entries: list[TensorEntry], modules: Modules | None
) -> tuple[LoraRecord | None, list[str]]:
    """Match an adapter with the modules of its base; without `modules` (base not at hand) shapes alone are checked.

    Returns the record, None where a problem leaves nothing to record, and every problem.
    """
    pairs, problems = lora_pairs(entries)
    record = _record(config, bound=0, total=0)
    problems += _shape_problems(config, record, pairs, modules)
    if modules is None:
        bound = total = len(pairs)
    else:
        wanted = config.targets(modules)
        names = {name_in_base(module, modules) or module for module in pairs}
        bound, total = len(wanted & names), len(wanted)
        problems += _left_over(wanted, names)
    if not bound:
        problems.append(f"no tensor binds to any module of the base (0 of {total} modules)")
        return None, problems
    return _record(config, bound=bound, total=total), problems


def _left_over(wanted: set[str], names: set[str]) -> list[str]:
    problems = []
    if missing := sorted(wanted - names):
        problems.append(
            f"{len(wanted) - len(missing)} of {len(wanted)} modules are bound; no tensors for {_some(missing)}"
        )
    if over := sorted(names - wanted):
        problems.append(f"{len(over)} modules have tensors but are not targeted in the base: {_some(over)}")
    return problems


def _shape_problems(
    config: LoraConfigFile, record: LoraRecord, pairs: dict[str, LoraPair], modules: Modules | None
) -> list[str]:
    wrong = []
    for module, pair in pairs.items():
        rank = record.rank_of(module)
        name = name_in_base(module, modules) if modules is not None else None
        weight = modules[name] if modules is not None and name is not None else None
        wrong += [f"{module}: {reason}" for reason in _pair_problems(config, pair, rank, weight)]
    return [f"{len(wrong)} shapes are wrong: {_some(wrong)}"] if wrong else []


def _pair_problems(config: LoraConfigFile, pair: LoraPair, rank: int, weight: tuple[int, ...] | None) -> list[str]:
    wanted = {"lora_A.weight", "lora_B.weight"}
    wanted |= {"lora_B.bias"} if config.lora_bias else set()
    wanted |= {"lora_magnitude_vector"} if config.use_dora else set()
    if set(pair.parts) != wanted:
        return [f"wanted {sorted(wanted)}, found {sorted(pair.parts)}"]
    a, b = pair.parts["lora_A.weight"].shape, pair.parts["lora_B.weight"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return [f"the configuration says rank {rank}, the tensors are A {list(a)} and B {list(b)}"]
    if 0 in a or 0 in b:
        return [f"empty tensors, A {list(a)} and B {list(b)}"]
    delta = (b[0], a[1])
    stored = tuple(reversed(delta)) if config.fan_in_fan_out else delta
    if weight is not None and stored != weight:
        return [f"the change is {list(stored)}, the base's weight {list(weight)}"]
    one_a_row = [part for part in ("lora_B.bias", "lora_magnitude_vector") if part in pair.parts]
    return [f"{part} is {list(pair.parts[part].shape)}" for part in one_a_row if pair.parts[part].shape != (b[0],)]


def name_in_base(module: str, modules: Modules) -> str | None:
    """The base's own name of `module`: some checkpoints leave out the first part (`transformer.`, `model.`)."""
    if module in modules:
        return module
    shorter = module.partition(".")[2]
    return shorter if shorter in modules else None


def _record(config: LoraConfigFile, *, bound: int, total: int) -> LoraRecord:
    root = config.r**0.5 if config.use_rslora else config.r
    return LoraRecord.model_construct(
        rank=config.r,
        alpha=float(config.lora_alpha),
        scaling=float(config.lora_alpha) / root,
        target_modules=tuple(sorted(set(config.target_modules))),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern={key: float(value) for key, value in config.alpha_pattern.items()},
        modules_bound=bound,
        modules_total=total,
    )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(f"{item:.120}" for item in items[:SHOWN]) + more
