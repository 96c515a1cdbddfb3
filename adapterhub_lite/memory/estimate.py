"""How many bytes a preset needs for a step, by component, from a model's config alone. Knows no data."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.loss_sizes import LossSize, frozen_head_bytes, trained_head_bytes
from adapterhub_lite.memory.heap import SLACK_BYTES
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.tracing import ModelShape, StepBytes, TracedStep, model_shape, trace_step

GIB = 2**30
# Python, torch, transformers and the rest, resident on a CPU; the CUDA context and its libraries on a GPU.
OVERHEAD_BYTES = {"cpu": 650 * 2**20, "cuda": 600 * 2**20}
# Of a CPU's activations, what the C heap keeps beside them, in holes between what lives: the slope of measured peaks over
# 0.1 to 2.2 GB of activations, in bf16 and fp32. Presets that save memory trim the heap.
HEAP_SHARE = 0.45
# Of the proof before the first step: tokens whose logits are all there, as the model itself makes them.
PROVEN_TOKENS = 96
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
        self._steps: dict[TracedStep, StepBytes] = {}

    def shape(self, target_modules: Any) -> ModelShape:
        """Parameters and sizes."""
        if target_modules not in self._shapes:
            self._shapes[target_modules] = model_shape(self.config, target_modules)
        return self._shapes[target_modules]

    def step(self, preset: MemoryPreset, workload: Workload) -> StepBytes:
        """Activations of one row, scaled to the batch: they grow with rows exactly, with tokens not always."""
        traced = traced_step(preset, workload)
        if traced not in self._steps:
            self._steps[traced] = trace_step(self.config, traced)
        return self._steps[traced].of_rows(workload.batch_size)


def traced_step(preset: MemoryPreset, workload: Workload) -> TracedStep:
    """One row of `workload` under `preset`, as it is traced."""
    trains_lora, whole = preset.trains == "lora", preset.strategy not in ("zero3", "fsdp")
    return TracedStep(
        sequence_length=workload.sequence_length,
        # Another dtype of the same size keeps as many bytes.
        dtype=torch.bfloat16 if preset.torch_dtype.itemsize == 2 else preset.torch_dtype,
        trains=preset.trains,
        rank=workload.rank if trains_lora else 0,
        target_modules=workload.target_modules if trains_lora else "all-linear",
        # What a layer is unpacked into does not grow with rows, and is reckoned apart.
        packed=False,
        lean=whole,
        # LLM.int8 looks for outliers in all rows at once, so that they are not alone when they lie end to end.
        end_to_end=whole and preset.quantization != "int8",
        device=workload.device,
    )


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
    shape = facts.shape(workload.target_modules)
    weights, constants = _weight_bytes(shape, preset)
    trained = _trained(shape, preset, workload)
    gradients = trained * preset.trained_bytes
    adapter = gradients if preset.trains == "lora" else 0
    optimizer = 2 * trained * (1 if "8bit" in preset.optimizer else preset.trained_bytes)
    split, ranks = preset.strategy, workload.world_size
    if split in ("zero1", "zero2", "zero3", "fsdp"):
        optimizer = 0 if preset.offload else optimizer // ranks
    if split in ("zero2", "zero3", "fsdp"):
        gradients //= ranks
    gathered = 0
    if split in ("zero3", "fsdp"):
        # One layer and the head are whole at a time.
        gathered = 0 if ranks == 1 and not preset.offload else weights // shape.layers + shape.head_parameters * 2
        weights, constants = (0, 0) if preset.offload else (weights // ranks, constants // ranks)
    # DDP's buckets are a second copy.
    buckets = gradients if split == "ddp" else 0
    moments = _moments(facts, preset, workload, gradients)
    worst = max(moments, key=lambda moment: sum(moment.values()))
    components = {
        **dict.fromkeys(COMPONENTS, 0), "weights": weights, "quantization": constants, "adapter": adapter,
        "optimizer": optimizer, "overhead": OVERHEAD_BYTES.get(workload.device, 0), **worst,
    }  # fmt: skip
    components["temporary"] += gathered + buckets + heap_bytes(facts, preset, workload)
    return MemoryEstimate(preset.name, workload, components)


def _moments(facts: ModelFacts, preset: MemoryPreset, workload: Workload, gradients: int) -> tuple[dict[str, int], ...]:
    """The components that come and go, at each moment of a step that may be its worst; `gradients` are one rank's."""
    shape, step = facts.shape(workload.target_modules), facts.step(preset, workload)
    checkpointing = preset.gradient_checkpointing
    saved, working = step.saved(shape.layers, checkpointing=checkpointing), step.working(checkpointing=checkpointing)
    working += _unpacking_bytes(shape, preset)
    held = gradients if workload.accumulation > 1 else 0
    loss, head = loss_bytes(shape, preset, workload), _head_gradient_bytes(shape, preset)
    # A tied head's gradient as the embedding comes on top of that as the head.
    embedding = head if shape.tied else 0
    # On a CPU the pre-flight keeps a copy of what is trained, until its step is undone.
    copied = _trained(shape, preset, workload) * preset.trained_bytes if workload.device == "cpu" else 0
    return (
        {"activations": saved, "loss": loss, "gradients": held},
        {"activations": saved, "temporary": working, "gradients": max(held, head)},
        {"temporary": working + embedding, "gradients": gradients},
        {"temporary": copied, "gradients": gradients},
        {"temporary": min(PROVEN_TOKENS, workload.sequence_length) * shape.vocabulary * preset.torch_dtype.itemsize},
    )


def heap_bytes(facts: ModelFacts, preset: MemoryPreset, workload: Workload) -> int:
    """What the C heap of a CPU keeps beside the activations, whichever moment is the worst."""
    if workload.device != "cpu":
        return 0
    layers = facts.shape(workload.target_modules).layers
    kept = int(HEAP_SHARE * facts.step(preset, workload).saved(layers, checkpointing=False))
    # Between two trims, up to all of the slack may lie there when the peak comes.
    return min(kept, SLACK_BYTES // 2) if preset.trims_heap else kept


def _trained(shape: ModelShape, preset: MemoryPreset, workload: Workload) -> int:
    """How many parameters are trained."""
    lora = workload.rank * shape.lora_inputs_outputs
    return {"lora": lora, "head": shape.head_parameters, "all": shape.parameters}[preset.trains]


def _weight_bytes(shape: ModelShape, preset: MemoryPreset) -> tuple[int, int]:
    """(weights, quantisation constants) of the base; embeddings, norms and the head are never quantised."""
    size = preset.torch_dtype.itemsize
    if preset.quantization is None:
        return shape.parameters * size, 0
    linear = shape.layer_linear_parameters
    if preset.quantization == "int8":
        return linear + shape.other_parameters * size, linear // max(1, shape.hidden) * 4
    return linear // 2 + shape.other_parameters * size, int(linear * NF4_CONSTANTS)


def loss_bytes(shape: ModelShape, preset: MemoryPreset, workload: Workload) -> int:
    """What the loss has at its worst: tiles of logits, the states' gradient in fp32, and what a trained head adds."""
    tokens = workload.batch_size * workload.sequence_length
    size = LossSize(tokens, shape.vocabulary, shape.hidden, preset.torch_dtype.itemsize, workload.device)
    return frozen_head_bytes(size) + (trained_head_bytes(size) if preset.trains != "lora" else 0)


def _head_gradient_bytes(shape: ModelShape, preset: MemoryPreset) -> int:
    """The head's gradient is there from the start of the backward pass on."""
    return shape.head_parameters * preset.trained_bytes if preset.trains != "lora" else 0


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
