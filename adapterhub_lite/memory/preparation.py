"""A loaded base made ready for a preset: frozen, checkpointed, never blown up to fp32. Knows transformers, not PEFT."""

import logging
from typing import Any

from adapterhub_lite.memory.presets import Machine, MemoryPreset


def prepare_for_training(model: Any, preset: MemoryPreset) -> Any:
    """Freeze `model` and set its checkpointing as `preset` says; call before the adapter is put on. Returns `model`.

    PEFT's `prepare_model_for_kbit_training` also casts every embedding, norm and head to fp32 (peft#816, #3265), which
    at a large vocabulary costs more than 4 bits save; nothing here changes a dtype.
    """
    if preset.trains != "all":
        model.requires_grad_(False)
    if preset.quantization is not None:
        _let_go_of_the_file(model)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights for a CPU at the first evaluation, rounding their scales to bf16:
            # the rest of the run would train beside another base.
            module.support_avx512bf16_for_cpu = False
    if preset.gradient_checkpointing:
        model.config.use_cache = False
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": preset.use_reentrant})
        # The first layer's input is an embedding without gradient: checkpointing would skip the whole backward pass.
        model.enable_input_require_grads()
    return model


def _is_news(record: logging.LogRecord) -> bool:
    """LLM.int8 says for each layer of each evaluation that it casts what it is given: hundreds of lines a step."""
    return "inputs will be cast" not in str(record.msg)


def _let_go_of_the_file(model: Any) -> None:
    """Copy what was not quantised: it still lies in the mapped weights file, all of which was read and stays resident."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def best_attention(preset: MemoryPreset, machine: Machine, supported: frozenset[str]) -> tuple[str, str]:
    """(attn_implementation for `from_pretrained`, the reason): flash where it is installed and legal, SDPA, else eager.

    `supported` are those that the model can take, as `ModelShape.attentions` has them.
    """
    if "flash_attention_2" not in supported:
        reason = "the model has no flash attention"
    elif machine.device != "cuda":
        reason = f"flash attention needs a GPU, and the run is on {machine.device}"
    elif preset.dtype == "float32":
        reason = "flash attention needs fp16 or bf16"
    elif machine.capability is not None and machine.capability < (8, 0):
        reason = "flash attention needs compute capability 8.0 or newer"
    elif "flash_attn" not in machine.packages:
        reason = "flash_attn is not installed"
    else:
        return "flash_attention_2", "flash_attn is installed and the GPU can run it"
    return ("sdpa", reason) if "sdpa" in supported else ("eager", f"{reason}, and the model has no SDPA")
