"""How many bytes a preset needs for a step, by component, from a model's config alone. Knows no data."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.tracing import ModelShape, StepBytes, model_shape, trace_step

GIB = 2**30
# Python, torch, transformers and the rest, resident on a CPU; the CUDA context and its libraries on a GPU.
OVERHEAD_BYTES = {"cpu": 700 * 2**20, "cuda": 600 * 2**20}
# Of the loss's tiles: products in the base's dtype and sums in fp32 of 2 ** 21 (CPU) or 2 ** 25 (GPU) logits.
TILE_LOGITS = {"cpu": 2**21, "cuda": 2**25}
# Rows up to this length have their score matrices made on a CPU; longer ones take torch's kernel, which makes none.
SHORT_TOKENS = 512
NF4_CONSTANTS = 1 / 64 + 4 / (64 * 256)
COMPONENTS = (
    "weights", "quantization", "adapter", "gradients", "optimizer", "activations", "loss", "temporary", "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One step on one device: rows, tokens a row, the LoRA, processes, and whether gradients wait for more rows."""

    batch_size: int
    sequence_length: int
    rank: int = 8
    target_modules: Any = "all-linear"
    world_size: int = 1
    accumulation: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = ("batch_size", "sequence_length", "rank", "world_size", "accumulation")
        wrong = [f"{name} is {getattr(self, name)}" for name in names if getattr(self, name) < 1]
        if wrong:
            raise ConfigurationError(f"A memory estimate needs numbers of at least 1: {', '.join(wrong)}.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component on each device, at the worst moment of a step; they add up to `total`."""

    preset: str
    workload: Workload
    components: dict[str, int] = field(hash=False)

    @property
    def total(self) -> int:
        """The peak in bytes."""
        return sum(self.components.values())

    def described(self) -> str:
        """`12.3 GiB: weights 9.1, activations 2.0, ...`, largest first, what rounds to nothing left out."""
        parts = sorted(self.components.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.005 * GIB)
        return f"{self.total / GIB:.2f} GiB: {shown}"


def estimate_memory(
    base: Any,
    preset: MemoryPreset | str,
    *,
    batch_size: int,
    sequence_length: int,
    rank: int = 8,
    target_modules: Any = "all-linear",
    world_size: int = 1,
    accumulation: int = 1,
    device: str = "cpu",
) -> MemoryEstimate:
    """Bytes that one device needs for a training step of `base` under `preset`.

    `base` is a config of transformers, a `ResolvedBase`, a folder with config.json, or a name; weights are not read.

    Raises:
        UnknownNameError: no such base or preset.
        ConfigurationError: the model cannot be traced, or a number below 1.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    workload = Workload(batch_size, sequence_length, rank, targets, world_size, accumulation, device)
    return estimate(facts_of(base), preset, workload)


class ModelFacts:
    """A config with what has been found out about it, so that many presets and batches share the tracing."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._shapes: dict[Any, ModelShape] = {}
        self._steps: dict[Any, StepBytes] = {}

    def shape(self, target_modules: Any) -> ModelShape:
        """Parameters and sizes."""
        if target_modules not in self._shapes:
            self._shapes[target_modules] = model_shape(self.config, target_modules)
        return self._shapes[target_modules]

    def step(self, preset: MemoryPreset, workload: Workload) -> StepBytes:
        """Activations of one row, scaled to the batch: they grow with rows exactly, with tokens not always."""
        rank = 0 if preset.trains == "head" else workload.rank
        key = (workload.sequence_length, rank, workload.target_modules, preset.torch_dtype.itemsize)
        if key not in self._steps:
            self._steps[key] = trace_step(
                self.config,
                batch_size=1,
                sequence_length=workload.sequence_length,
                dtype=preset.torch_dtype,
                rank=rank,
                target_modules=workload.target_modules,
            )
        one, rows = self._steps[key], workload.batch_size
        return StepBytes(one.fixed * rows, one.per_layer * rows, one.temporary * rows, one.layer_input * rows)


_KNOWN: dict[str, ModelFacts] = {}
MOST_KNOWN = 16


def facts_of(base: Any) -> ModelFacts:
    """The facts of `base` (as in `estimate_memory`), kept for the next question about the same config.

    Raises:
        UnknownNameError: no such base.
    """
    config = read_config(base)
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = ModelFacts(config)
    return _KNOWN[key]


def estimate(facts: ModelFacts, preset: MemoryPreset, workload: Workload) -> MemoryEstimate:
    """`estimate_memory` for facts that are shared between many questions."""
    shape, step = facts.shape(workload.target_modules), facts.step(preset, workload)
    weights, constants = _weight_bytes(shape, preset)
    lora = workload.rank * shape.lora_inputs_outputs if preset.trains == "lora" else 0
    trained = {"lora": lora, "head": shape.head_parameters, "all": shape.parameters}[preset.trains]
    size = 4 if preset.trained_dtype == "float32" else 2
    gradients = trained * size
    optimizer = 2 * trained * (1 if "8bit" in preset.optimizer else size)
    saved = step.saved(shape.layers, checkpointing=preset.gradient_checkpointing)
    loss = _loss_bytes(shape, preset, workload)
    temporary = step.working(checkpointing=preset.gradient_checkpointing) + _unpacking_bytes(shape, preset)
    temporary += score_bytes(shape, workload)
    split, ranks = preset.strategy, workload.world_size
    if split in ("zero1", "zero2", "zero3", "fsdp"):
        optimizer //= ranks
    if split in ("zero2", "zero3", "fsdp"):
        gradients //= ranks
    if split in ("zero3", "fsdp"):
        gathered = weights // max(1, shape.layers) + shape.head_parameters * 2
        temporary += 0 if ranks == 1 and not preset.offload else gathered
        weights, constants = (0, 0) if preset.offload else (weights // ranks, constants // ranks)
        optimizer = 0 if preset.offload else optimizer
    if split == "ddp":
        temporary += gradients
    # The loss and the layers' temporaries are not there together, nor are activations and the last gradients.
    if loss >= temporary:
        temporary = 0
    else:
        loss = 0
    held = gradients if workload.accumulation > 1 else 0
    if saved + loss + temporary + held >= gradients:
        gradients = held
    else:
        saved = loss = temporary = 0
    values = (
        weights, constants, lora * size, gradients, optimizer, saved, loss, temporary,
        OVERHEAD_BYTES.get(workload.device, 0),
    )  # fmt: skip
    return MemoryEstimate(preset.name, workload, dict(zip(COMPONENTS, values, strict=True)))


def _weight_bytes(shape: ModelShape, preset: MemoryPreset) -> tuple[int, int]:
    """(weights, quantisation constants) of the base; embeddings, norms and the head are never quantised."""
    size = preset.torch_dtype.itemsize
    if preset.quantization is None:
        return shape.parameters * size, 0
    linear = shape.layer_linear_parameters
    if preset.quantization == "int8":
        return linear + shape.other_parameters * size, linear // max(1, shape.hidden) * 4
    return linear // 2 + shape.other_parameters * size, int(linear * NF4_CONSTANTS)


def _loss_bytes(shape: ModelShape, preset: MemoryPreset, workload: Workload) -> int:
    tokens = workload.batch_size * workload.sequence_length
    logits = min(tokens * shape.vocabulary, TILE_LOGITS.get(workload.device, 2**25))
    states = tokens * shape.hidden
    size = preset.torch_dtype.itemsize
    own_gradient = shape.head_parameters * size if preset.trains != "lora" else 0
    return logits * (4 + size % 4) + states * (4 + 3 * size) + own_gradient


def score_bytes(shape: ModelShape, workload: Workload) -> int:
    """Three score matrices in fp32: how short rows laid end to end are attended to on a CPU."""
    short = workload.device == "cpu" and shape.full_attention and workload.sequence_length <= SHORT_TOKENS
    return 3 * 4 * shape.heads * workload.batch_size * workload.sequence_length**2 if short else 0


def _unpacking_bytes(shape: ModelShape, preset: MemoryPreset) -> int:
    """A quantised layer is unpacked whole, one at a time, in the dtype it is computed in."""
    return 0 if preset.quantization is None else shape.largest_linear * preset.torch_dtype.itemsize


def read_config(base: Any) -> Any:
    """The config of `base`; of a Hub id only config.json is fetched.

    Raises:
        UnknownNameError: no config can be found under that name.
    """
    if hasattr(base, "get_text_config"):
        return base
    if isinstance(base, ResolvedBase):
        return _config_in(str(base.folder))
    made = adapterhub_home() / "bases" / str(base)
    if (made / "config.json").is_file():
        return _config_in(str(made))
    return _config_in(str(base))


@lru_cache(maxsize=16)
def _config_in(name: str) -> Any:
    from transformers import AutoConfig

    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.bases.resolve import EMBEDDED_BASES

    if name in EMBEDDED_BASES:
        name = str(resolve_base(name).folder)
    known = [*EMBEDDED_BASES, "a folder with config.json", "a Hub id org/model"]
    if not (Path(name) / "config.json").is_file() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UnknownNameError.among("base", name, known)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnknownNameError.among("base", name, known) from error
