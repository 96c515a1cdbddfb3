"""A dry run of the whole step on fake tensors: every layer, the loss's buffers and the optimizer, nothing allocated.

Slower than the estimate (seconds to a minute): all layers run, with the checkpointing that the run has, so that what is
live at each moment is counted. The base's weights are counted at their packed size, and the loss, which this room does not
know, as the estimate has it.
"""

from dataclasses import replace
from typing import Any

import torch

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.estimate import EstimateParts, ModelFacts, Workload, read_config, traced_step
from adapterhub_lite.memory.preparation import prepare_for_training
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.tracing import LiveBytes, as_trained, build_model, put_on_cpu, without_chatter


def dry_run(base: Any, preset: MemoryPreset | str, workload: Workload) -> int:  # `base` as in `estimate_memory`
    """Peak bytes of the second step on one device, overhead included.

    Only presets of one device; weights that a preset quantises are run in 16 bits and counted at their packed size.

    Raises:
        ConfigurationError: a preset that splits over devices, or a model that cannot run on fake tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    preset = find_preset(preset) if isinstance(preset, str) else preset
    if preset.strategy != "single":
        raise ConfigurationError(f"A dry run is of one device, and {preset.name!r} splits over several: estimate it.")
    facts = ModelFacts(read_config(base))
    lora, step = facts.lora(preset, workload), facts.step(preset, workload)
    parts = EstimateParts(facts.shape, lora, step, preset, workload)
    with without_chatter(), torch.device("meta"):
        model = prepare_for_training(build_model(facts.config, dtype=preset.torch_dtype), preset)
        model = as_trained(model, replace(traced_step(preset, workload), packed=preset.quantization is not None))
    with without_chatter(), FakeTensorMode(allow_non_fake_inputs=True):
        peak = _peak_of_two_steps(put_on_cpu(model), parts)
    components = parts.estimate().components
    held = sum(components[name] for name in ("weights", "quantization", "adapter", "overhead"))
    return peak + held + parts.heap()


def _peak_of_two_steps(model: Any, parts: EstimateParts) -> int:
    """Peak bytes beyond all parameters; the second step has the optimizer's states from the start."""
    trained = [p for p in model.parameters() if p.requires_grad]
    head = model.get_output_embeddings().weight
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        stepped = [p.detach().float() for p in trained] if parts.preset.keeps_masters else trained
    adam = torch.optim.AdamW(stepped, lr=1e-3, foreach=False)
    in_8_bits: list[torch.Tensor] = []
    with live:
        for _ in range(2):
            tokens = traced_step(parts.preset, parts.workload).sequence_length
            ids = torch.zeros((parts.workload.batch_size, tokens), dtype=torch.long)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            buffers = torch.empty(parts.loss(), dtype=torch.uint8)
            del buffers
            if head.requires_grad:
                head.grad = torch.zeros_like(head)
            if states.requires_grad:
                states.backward(torch.zeros_like(states))
            del states
            if stepped is not trained:
                for master, weight in zip(stepped, trained, strict=True):
                    master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
            if "8bit" not in parts.preset.optimizer:
                adam.step()
            elif not in_8_bits:
                in_8_bits = [torch.zeros_like(p, dtype=torch.uint8) for p in trained for _ in range(2)]
            adam.zero_grad()
            model.zero_grad()
    return live.peak
