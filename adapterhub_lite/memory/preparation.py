"""A loaded base made ready for a preset: frozen, checkpointed, never cast to fp32, and its freed memory returned.

Knows transformers, not PEFT. What is freed is returned to the system on a CPU with glibc alone.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite import devices
from adapterhub_lite.memory.presets import Machine, MemoryPreset

# The heap is trimmed each time the process has grown by so much.
SLACK_BYTES = 128 * 2**20


def prepare_for_training(model: Any, preset: MemoryPreset) -> Any:
    """Freeze `model` and set its checkpointing as `preset` says; call before the adapter is put on. Returns `model`.

    PEFT's `prepare_model_for_kbit_training` also casts every embedding, norm and head to fp32 (peft#816, #3265), which
    at a large vocabulary costs more than 4 bits save; nothing here changes a dtype.
    """
    if preset.trains != "all":
        model.requires_grad_(False)
    if preset.quantization is not None:
        # What was not quantised still lies in the mapped weights file, all of which was read and stays resident.
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    if preset.gradient_checkpointing:
        model.config.use_cache = False
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": preset.use_reentrant})
        # The first layer's input is an embedding without gradient: checkpointing would skip the whole backward pass.
        model.enable_input_require_grads()
    return model


def _is_news(record: logging.LogRecord) -> bool:
    """LLM.int8 says for each layer of each evaluation that it casts its input: hundreds of lines per step."""
    return "inputs will be cast" not in str(record.msg)


def best_attention(preset: MemoryPreset, machine: Machine, supported: frozenset[str]) -> tuple[str, str]:
    """(attn_implementation for `from_pretrained`, the reason): flash where it is installed and legal, SDPA, else eager.

    `supported` are those that the model can take, as `ModelFacts.attentions` has them.
    """
    if "flash_attention_2" not in supported:
        reason = "the model has no flash attention"
    elif not devices.runs_flash_attn(machine.device):
        reason = f"flash attention needs a GPU of CUDA or ROCm, and the run is on {machine.device}"
    elif preset.dtype == "float32":
        reason = "flash attention needs fp16 or bf16"
    elif machine.capability is not None and machine.capability < (8, 0):
        reason = "flash attention needs compute capability 8.0 or newer"
    elif "flash_attn" not in machine.packages:
        reason = "flash_attn is not installed"
    else:
        return "flash_attention_2", "flash_attn is installed and the GPU can run it"
    return ("sdpa", reason) if "sdpa" in supported else ("eager", f"{reason}, and the model has no SDPA")


def give_back_freed_memory(model: Any, preset: MemoryPreset) -> None:
    """Return what loading freed to the system; under presets that save memory, do so before each block as well.

    glibc keeps what is freed, scattered between what is still in use: a third of the peak of a checkpointed step of 8 x
    1024 tokens. `M_MMAP_THRESHOLD` would return every large block at once, but then every one is faulted in anew, which
    makes a step half as long again. Presets made for speed keep what they have.
    """
    # Not at the top: estimates, which import this room, need no layers of transformers.
    from transformers.modeling_layers import GradientCheckpointingLayer

    if devices.trim_heap() and preset.trims_heap:
        trim = _Trim()
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                if not preset.gradient_checkpointing:
                    # Under checkpointing the blocks run again in the backward pass, and their own hooks look.
                    layer.register_forward_hook(trim.before_backward)
                for block in layer.children():
                    # Attention and feed-forward; a norm or a dropout has nothing in it.
                    if any(True for _ in block.children()):
                        block.register_forward_pre_hook(trim)


class _Trim:
    """A hook that trims the heap whenever the process has grown by the slack. Holds no handle: models are copied."""

    def __init__(self) -> None:
        self._resident = _resident_bytes()

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        """Look, and perhaps trim."""
        if not torch.compiler.is_compiling():
            self._trim()

    def before_backward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Look again when the gradient reaches this layer."""
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad and not torch.compiler.is_compiling():
            states.register_hook(lambda gradient: self._trim())

    def _trim(self) -> None:
        if _resident_bytes() - self._resident >= SLACK_BYTES:
            devices.trim_heap()
            self._resident = _resident_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
