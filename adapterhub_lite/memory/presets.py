"""The memory presets, each a frozen value, and which of them a machine can honour. Knows no model and no data."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from adapterhub_lite import devices
from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.errors import UnknownNameError

Trained = Literal["all", "head", "lora"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class MemoryPreset:
    """How a run spends memory. Dtypes are torch names; the adapter is kept in fp32 for the optimizer's small steps, and with
    `master_weights` so is a copy of whatever else is trained."""

    name: str
    summary: str
    trains: Trained = "lora"
    dtype: str = "bfloat16"
    trained_dtype: str = "float32"
    master_weights: bool = True
    quantization: Literal["int8", "nf4"] | None = None
    mixed_precision: Literal["fp16", "bf16"] | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    strategy: Strategy = "single"
    offload: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the base is computed in."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def trained_bytes(self) -> int:
        """Bytes of each trained parameter and of its gradient."""
        return 4 if self.trained_dtype == "float32" else 2

    @property
    def keeps_masters(self) -> bool:
        """Whether the optimizer steps fp32 copies of what is trained."""
        return self.master_weights and self.trained_dtype != "float32"

    @property
    def use_reentrant(self) -> bool:
        """Which checkpointing: ZeRO-3 needs the reentrant one with PEFT, everything else the other."""
        return self.strategy == "zero3"

    @property
    def trims_heap(self) -> bool:
        """Whether a CPU's heap is trimmed between blocks, which takes time: only where memory matters more."""
        return self.gradient_checkpointing or self.quantization is not None

    def quantization_config(self) -> Any:
        """The bitsandbytes configuration for `from_pretrained`, or None. The head is left as it is."""
        if self.quantization is None:
            return None
        # FSDP can only split storage of one dtype (bitsandbytes#970).
        storage = self.torch_dtype if self.strategy == "fsdp" else None
        return Quantization(self.quantization).bitsandbytes(self.torch_dtype, storage)

    def training_arguments(self) -> dict[str, Any]:
        """The fields of `TrainingArguments` that this preset sets; what a user sets by hand wins over them."""
        fields: dict[str, Any] = {
            "fp16": self.mixed_precision == "fp16",
            "bf16": self.mixed_precision == "bf16",
            "activation_checkpointing": self.gradient_checkpointing,
            "optim": self.optimizer,
        }
        if self.gradient_checkpointing:
            fields["activation_checkpointing_kwargs"] = {"use_reentrant": self.use_reentrant}
        if self.strategy.startswith("zero"):
            fields["deepspeed"] = deepspeed_config(int(self.strategy[-1]), offload=self.offload)
        if self.strategy == "fsdp":
            fields["fsdp"] = True
            fields["fsdp_config"] = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        return fields


def deepspeed_config(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration for ZeRO `stage` whose open values the `Trainer` fills in."""
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # The optimizer is the one that the arguments name, also with an offload.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


_PRESETS = (
    MemoryPreset("full", "every weight of the base, in bf16", trains="all", trained_dtype="bfloat16"),
    MemoryPreset("head-only", "the output head alone", trains="head", trained_dtype="bfloat16"),
    MemoryPreset("lora-fp32", "LoRA on a base in fp32", dtype="float32"),
    MemoryPreset("lora-fp16", "LoRA on a base in fp16, with loss scaling", dtype="float16", mixed_precision="fp16"),
    MemoryPreset("lora-bf16", "LoRA on a base in bf16"),
    MemoryPreset("lora-bf16-gc", "the same, activations recomputed in backward", gradient_checkpointing=True),
    MemoryPreset("lora-int8", "LoRA on a base in 8 bits (LLM.int8)", quantization="int8"),
    MemoryPreset("qlora-nf4", "LoRA on a base in 4 bits (nf4, double quantisation)", quantization="nf4"),
    MemoryPreset(
        "qlora-nf4-gc",
        "the same, activations recomputed in backward",
        quantization="nf4",
        gradient_checkpointing=True,
    ),
    MemoryPreset(
        "qlora-nf4-paged",
        "the same, with 8-bit optimizer states that may leave the GPU",
        quantization="nf4",
        gradient_checkpointing=True,
        optimizer="paged_adamw_8bit",
    ),
    MemoryPreset("ddp", "LoRA in bf16, a whole copy on each device", strategy="ddp"),
    MemoryPreset("zero1", "LoRA in bf16, optimizer states split (ZeRO-1)", strategy="zero1"),
    MemoryPreset("zero2", "LoRA in bf16, gradients split too (ZeRO-2)", strategy="zero2"),
    MemoryPreset("zero3", "LoRA in bf16, weights split too (ZeRO-3)", strategy="zero3", gradient_checkpointing=True),
    MemoryPreset(
        "zero3-offload",
        "ZeRO-3 with weights and optimizer states in the host's memory",
        strategy="zero3",
        gradient_checkpointing=True,
        offload=True,
    ),
    MemoryPreset("fsdp", "LoRA in bf16, weights split (FSDP2)", strategy="fsdp", gradient_checkpointing=True),
    MemoryPreset(
        "fsdp-qlora",
        "weights in 4 bits, split (FSDP2)",
        quantization="nf4",
        strategy="fsdp",
        gradient_checkpointing=True,
    ),
)
MEMORY_PRESETS: dict[str, MemoryPreset] = {preset.name: preset for preset in _PRESETS}
"""All presets by name, in the order of the documentation."""


def find_preset(name: str) -> MemoryPreset:
    """The preset called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in MEMORY_PRESETS:
        raise UnknownNameError.among("memory preset", name, list(MEMORY_PRESETS))
    return MEMORY_PRESETS[name]


@dataclass(frozen=True)
class Machine:
    """What a preset is judged by. `capability` is CUDA's; `packages` are the optional ones that are installed."""

    device: str
    memory_bytes: int
    world_size: int = 1
    capability: tuple[int, int] | None = None
    packages: frozenset[str] = frozenset()

    @classmethod
    def present(cls, *, memory_bytes: int | None = None, world_size: int = 1, device: str | None = None) -> "Machine":
        """This machine: the first GPU, or the CPU (also with `device="cpu"`) with what memory is available now.

        Processes on a CPU share its memory: each has its part, of as many as the launcher started here.
        """
        packages = frozenset(name for name in ("bitsandbytes", "deepspeed", "flash_attn") if find_spec(name))
        kind = devices.accelerator()
        if kind is not None and device != "cpu":
            free = memory_bytes or devices.free_bytes(kind) or available_memory()
            return cls(kind.type, free, world_size, devices.compute_capability(), packages)
        sharing = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
        return cls("cpu", memory_bytes or available_memory() // sharing, world_size, None, packages)

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 is computed in hardware (a CPU emulates it where it is not)."""
        return self.capability is None or self.capability >= (8, 0)


def available_memory() -> int:
    """Bytes of host memory that new processes can have now."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(facts["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refusal(preset: MemoryPreset, machine: Machine, *, model_quantized: bool = False) -> str | None:
    """Why `machine` cannot run `preset`, in one clause; None when it can. This is the matrix of what is legal."""
    split = preset.strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    lacks_deepspeed = preset.strategy.startswith("zero") and "deepspeed" not in machine.packages
    alone = "it splits over processes, and there is one" + (", and deepspeed is not installed" * lacks_deepspeed)
    rules = (
        (preset.quantization and "bitsandbytes" not in machine.packages, "bitsandbytes is not installed"),
        (preset.quantization and model_quantized, "the base is quantised already"),
        (preset.trains == "all" and model_quantized, "a quantised base cannot be trained whole"),
        (preset.mixed_precision == "fp16" and machine.device == "cpu", "loss scaling in fp16 needs a GPU"),
        (preset.dtype == "bfloat16" and not machine.has_bf16, "bf16 needs compute capability 8.0 or newer"),
        (split and not preset.offload and machine.world_size < 2, alone),
        # A LoRA has presets for several; whole weights are copied to each device, as by DDP.
        (
            not split and preset.trains == "lora" and machine.world_size > 1,
            f"it is for one process, and there are {machine.world_size}",
        ),
        (lacks_deepspeed, "deepspeed is not installed"),
        (preset.strategy == "fsdp" and machine.device == "cpu", "Accelerate leaves FSDP out on a CPU"),
        (preset.offload and machine.device == "cpu", "there is no device to leave"),
    )
    return next((reason for broken, reason in rules if broken), None)
