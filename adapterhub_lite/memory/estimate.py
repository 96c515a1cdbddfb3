"""How many bytes a preset needs for a step, by component, from a model's config alone. Knows no data."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.broken import read_by_transformers
from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.loss_sizes import LossSize, frozen_head_bytes, trained_head_bytes
from adapterhub_lite.memory.preparation import SLACK_BYTES
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.stand_ins import rounded_tokens
from adapterhub_lite.memory.tracing import (
    LoraShape,
    ModelShape,
    StepBytes,
    TracedStep,
    lora_shape,
    model_shape,
    trace_step,
)

GIB = 2**30
# Python, torch, transformers and the rest, resident on a CPU; the CUDA context and its libraries on a GPU.
OVERHEAD_BYTES = {"cpu": 650 * 2**20, "cuda": 600 * 2**20}
# Of a CPU's activations, what the C heap keeps in holes between what is in use: the slope of measured peaks over 0.1 to 2.2 GB
# of activations, in bf16 and fp32. Presets that save memory trim the heap.
HEAP_SHARE = 0.55
# The proof before the first step computes the model's own logits of so many tokens.
PROVEN_TOKENS = 96
NF4_CONSTANTS = 1 / 64 + 4 / (64 * 256)
COMPONENTS = (
    "weights", "quantization", "adapter", "gradients", "optimizer", "activations", "loss", "temporary", "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One step on one device: rows, tokens per row, the LoRA, processes, and how many steps an update accumulates."""

    batch_size: int
    sequence_length: int
    rank: int = 8
    # As in PEFT's LoraConfig: a name, a pattern or a tuple of names; or a `GivenAdapter`, which has a rank of its own.
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
    """Bytes by component on each device, at the worst moment of a step; they add up to `total`.

    Where the layers could not be traced, `unpredicted` says why: activations are missing then, and the total is a bound.
    """

    preset: str
    workload: Workload
    components: dict[str, int] = field(hash=False)
    unpredicted: str = ""

    @property
    def total(self) -> int:
        """The peak in bytes; the least that it is where something is unpredicted."""
        return sum(self.components.values())

    def described(self) -> str:
        """`12.3 GiB: weights 9.1, activations 2.0, ...`, largest first, without what rounds to nothing."""
        parts = sorted(self.components.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.005 * GIB)
        if self.unpredicted:
            return f"at least {self.total / GIB:.2f} GiB: {shown}, and activations, which are not predicted"
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
        ConfigurationError: the LoRA does not fit the model, or a number is below 1.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    targets = tuple(target_modules) if isinstance(target_modules, list) else target_modules
    workload = Workload(batch_size, sequence_length, rank, targets, world_size, accumulation, device)
    return estimate(facts_of(base), preset, workload)


class ModelFacts:
    """A config with what has been found out about it, so that many presets and batches share the tracing."""

    def __init__(self, config: Any) -> None:  # a config of transformers: its fields differ by family
        self.config = config
        self._loras: dict[tuple[Any, int], LoraShape] = {}
        self._steps: dict[TracedStep, StepBytes | ConfigurationError] = {}

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantised as they are stored."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def attentions(self) -> frozenset[str]:
        """The implementations besides `eager`, by transformers' names, that the model's class says it can take."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        able = {
            "sdpa": getattr(kind, "_supports_sdpa", True),
            "flash_attention_2": getattr(kind, "_supports_flash_attn", False),
        }
        return frozenset(name for name, supported in able.items() if supported)

    @cached_property
    def shape(self) -> ModelShape:
        """Parameters and sizes.

        Raises:
            ConfigurationError: it is no causal language model.
        """
        return model_shape(self.config)

    def lora(self, preset: MemoryPreset, workload: Workload) -> LoraShape:
        """The LoRA that `preset` trains.

        Raises:
            ConfigurationError: the LoRA does not fit the model.
        """
        key = workload.target_modules, workload.rank
        if preset.trains != "lora":
            return LoraShape(0, 0)
        if key not in self._loras:
            self._loras[key] = lora_shape(self.config, *key)
        return self._loras[key]

    def step(self, preset: MemoryPreset, workload: Workload) -> StepBytes:
        """Activations of one row, scaled to the batch: they grow with rows exactly, with tokens not always.

        Raises:
            ConfigurationError: the model cannot be traced.
        """
        traced = traced_step(preset, workload)
        if traced not in self._steps:
            try:
                self._steps[traced] = trace_step(self.config, traced)
            except ConfigurationError as error:
                self._steps[traced] = error
        found = self._steps[traced]
        if isinstance(found, ConfigurationError):
            raise found
        return found.of_rows(workload.batch_size)


def traced_step(preset: MemoryPreset, workload: Workload) -> TracedStep:
    """One row of `workload` under `preset`, as it is traced."""
    trains_lora, whole = preset.trains == "lora", preset.strategy not in ("zero3", "fsdp")
    tokens = workload.sequence_length
    if workload.device == "cpu" and preset.torch_dtype.itemsize == 2:
        tokens = rounded_tokens(tokens, workload.batch_size)
    return TracedStep(
        sequence_length=tokens,
        # Another dtype of the same size keeps as many bytes.
        dtype=torch.bfloat16 if preset.torch_dtype.itemsize == 2 else preset.torch_dtype,
        trains=preset.trains,
        rank=workload.rank if trains_lora else 0,
        target_modules=workload.target_modules if trains_lora else "all-linear",
        # What a layer is dequantised into does not grow with rows, and is added apart.
        packed=False,
        lean=whole,
        # A layer that is trained itself keeps its input, and so does LLM.int8's product.
        remade=trains_lora and preset.quantization != "int8",
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
    """`estimate_memory` for facts that are shared between many questions.

    Raises:
        ConfigurationError: the LoRA does not fit the model.
    """
    try:
        step, unpredicted = facts.step(preset, workload), ""
    except ConfigurationError as error:
        step, unpredicted = StepBytes(0, (0,), (0,), 0, 0), str(error)
    return EstimateParts(facts.shape, facts.lora(preset, workload), step, preset, workload).estimate(unpredicted)


@dataclass(frozen=True)
class EstimateParts:
    """What an estimate is made of, each in bytes on one device."""

    shape: ModelShape
    lora: LoraShape
    step: StepBytes
    preset: MemoryPreset
    workload: Workload

    @property
    def split(self) -> int:
        """Into how many parts ZeRO and FSDP split what they split."""
        return self.workload.world_size if self.preset.strategy in ("zero1", "zero2", "zero3", "fsdp") else 1

    @property
    def splits_weights(self) -> bool:
        """Whether each device holds a part of the weights."""
        return self.preset.strategy in ("zero3", "fsdp")

    @property
    def trained(self) -> int:
        """Bytes of what is trained, as one gradient of it is."""
        shape = self.shape
        counts = {"lora": self.lora.parameters, "head": shape.head_parameters, "all": shape.parameters}
        return counts[self.preset.trains] * self.preset.trained_bytes

    @property
    def masters(self) -> int:
        """Bytes of the fp32 copies that the optimizer steps."""
        return 4 * (self.trained // self.preset.trained_bytes) if self.preset.keeps_masters else 0

    @property
    def optimizer(self) -> int:
        """Bytes of its two moments, in 8 bits or as what it steps, and of the copies that it steps."""
        moment = (
            self.trained // self.preset.trained_bytes
            if "8bit" in self.preset.optimizer
            else self.masters or self.trained
        )
        return 2 * moment + self.masters

    @property
    def gradients(self) -> int:
        """The gradients of one device, once all are there."""
        return self.trained // (self.split if self.preset.strategy != "zero1" else 1)

    def weights(self) -> tuple[int, int]:
        """(weights, quantisation constants) of the base; embeddings, norms, experts and the head are not quantised."""
        size, linear, other = (
            self.preset.torch_dtype.itemsize,
            self.shape.linear_parameters,
            self.shape.other_parameters,
        )
        if self.preset.quantization is None:
            return self.shape.parameters * size, 0
        if self.preset.quantization == "int8":
            return linear + other * size, linear // max(1, self.shape.hidden) * 4
        return linear // 2 + other * size, int(linear * NF4_CONSTANTS)

    def estimate(self, unpredicted: str = "") -> MemoryEstimate:
        """The sum of all parts, at the worst moment of a step."""
        weights, constants = self.weights()
        gathered = 0
        if self.splits_weights:
            # One layer and the head are whole at a time.
            alone = self.split == 1 and not self.preset.offload
            gathered = 0 if alone else weights // self.shape.layers + self.shape.head_parameters * 2
            parts = 0 if self.preset.offload else self.split
            weights, constants = (weights // parts, constants // parts) if parts else (0, 0)
        worst = max(self.moments(), key=lambda moment: sum(moment.values()))
        components = {
            **dict.fromkeys(COMPONENTS, 0),
            "weights": weights,
            "quantization": constants,
            "adapter": self.trained if self.preset.trains == "lora" else 0,
            "optimizer": 0 if self.preset.offload else self.optimizer // self.split,
            "overhead": OVERHEAD_BYTES["cpu" if self.workload.device == "cpu" else "cuda"],
            **worst,
        }
        # DDP's buckets are a second copy of the gradients.
        copies = self.preset.strategy in ("single", "ddp") and self.workload.world_size > 1
        buckets = self.gradients if copies else 0
        components["temporary"] += gathered + buckets + self.heap()
        return MemoryEstimate(self.preset.name, self.workload, components, unpredicted)

    def moments(self) -> tuple[dict[str, int], ...]:
        """The components that come and go, at each moment of a step that may be its worst."""
        shape, preset, workload = self.shape, self.preset, self.workload
        checkpointing, size = preset.gradient_checkpointing, preset.torch_dtype.itemsize
        saved = self.step.saved(checkpointing=checkpointing)
        # A quantised layer is dequantised whole, one at a time, in the dtype it is computed in.
        dequantised = shape.largest_linear * size if preset.quantization else 0
        working = self.step.working(checkpointing=checkpointing) + dequantised
        # Between accumulated batches; beside copies their sums are in fp32.
        held = (self.masters or self.gradients) if workload.accumulation > 1 else 0
        # The head's gradient is there from the start of the backward pass on; that of a tied head as the embedding is added.
        head = shape.head_parameters * preset.trained_bytes if preset.trains != "lora" else 0
        embedding = head if shape.tied else 0
        # On a CPU the pre-flight keeps a copy of what is trained, until its step is undone.
        copied = self.trained if workload.device == "cpu" else 0
        proof = min(PROVEN_TOKENS, workload.sequence_length) * shape.vocabulary * size
        return (
            {"activations": saved, "loss": self.loss(), "gradients": held},
            {"activations": saved, "temporary": working, "gradients": max(held, head)},
            {"temporary": working + embedding, "gradients": max(held, self.gradients)},
            # The optimizer's step; where it has copies, they have the gradients then.
            {"temporary": copied, "gradients": self.masters or self.gradients},
            {"temporary": proof},
        )

    def loss(self) -> int:
        """What the loss takes at its worst."""
        tokens = self.workload.batch_size * self.workload.sequence_length
        item = self.preset.torch_dtype.itemsize
        columns = self.lora.head_columns if self.preset.trains == "lora" else self.shape.hidden
        states = LossSize(tokens, self.shape.vocabulary, self.shape.hidden, item, self.workload.device)
        return frozen_head_bytes(states) + (trained_head_bytes(replace(states, columns=columns)) if columns else 0)

    def heap(self) -> int:
        """What the C heap of a CPU keeps as well as the activations, whichever moment is the worst."""
        if self.workload.device != "cpu":
            return 0
        saved = self.step.saved(checkpointing=False)
        # Between two trims, up to all of the slack may lie there when the peak comes.
        return min(saved, SLACK_BYTES // 2) if self.preset.trims_heap else int(HEAP_SHARE * saved)


def read_config(base: Any) -> Any:  # whatever `estimate_memory` takes, to a config of transformers
    """The config of `base`; of a Hub id, config.json alone is fetched.

    Raises:
        UnknownNameError: no config can be found under that name.
        HubPermissionError: the hub has no such repository, or none that may be read.
        HubUnreachableError: the hub has to be asked and cannot be.
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
    from adapterhub_lite.bases.resolve import EMBEDDED_BASES, fetch_config

    if name in EMBEDDED_BASES:
        name = str(resolve_base(name).folder)
    known = [*EMBEDDED_BASES, "a folder with config.json", "a Hub id org/model"]
    folder = Path(name)
    if not (folder / "config.json").is_file():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UnknownNameError.among("base", name, known)
        folder = fetch_config(name).parent
    with read_by_transformers("configuration", folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
