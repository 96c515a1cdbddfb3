"""A dry run of the whole step on fake tensors: every layer, the loss's buffers and the optimizer, nothing allocated.

Slower than the estimate (seconds to a minute): all layers run, with the checkpointing that the run has, so that what is
live at each moment is counted and not reckoned from two of them. The base's weights are counted at their packed size,
and the loss, which this room does not know, as the estimate has it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.estimate import (
    OVERHEAD_BYTES,
    ModelFacts,
    Workload,
    estimate,
    heap_bytes,
    loss_bytes,
    read_config,
    traced_step,
)
from adapterhub_lite.memory.preparation import prepare_for_training
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.tracing import LiveBytes, as_trained, build_model, without_chatter


def dry_run(base: Any, preset: MemoryPreset | str, workload: Workload) -> int:
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
    with without_chatter(), FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(facts.config, depth=None, dtype=preset.torch_dtype)
        prepare_for_training(model, preset)
        as_trained(model, replace(traced_step(preset, workload), packed=preset.quantization is not None))
        loss = loss_bytes(facts.shape(workload.target_modules), preset, workload)
        peak = _peak_of_two_steps(model, preset, workload, loss)
    reckoned = estimate(facts, preset, workload).components
    held = sum(reckoned[name] for name in ("weights", "quantization", "adapter"))
    return peak + held + heap_bytes(facts, preset, workload) + OVERHEAD_BYTES.get(workload.device, 0)


def _peak_of_two_steps(model: Any, preset: MemoryPreset, workload: Workload, loss: int) -> int:
    """Peak bytes beyond all parameters; the second step has the optimizer's states from the start."""
    trained = [p for p in model.parameters() if p.requires_grad]
    head = model.get_output_embeddings().weight
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        step = _optimizer(trained, preset)
        for _ in range(2):
            ids = torch.zeros((workload.batch_size, workload.sequence_length), dtype=torch.long)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            buffers = torch.empty(loss, dtype=torch.uint8)
            del buffers
            if head.requires_grad:
                head.grad = torch.zeros_like(head)
            if states.requires_grad:
                states.backward(torch.zeros_like(states))
            del states
            step()
    return live.peak


def _optimizer(trained: list[torch.Tensor], preset: MemoryPreset) -> Callable[[], None]:
    """A function that makes a step as the preset's optimizer does, as far as memory goes, and drops the gradients."""
    adam = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    quantized: list[torch.Tensor] = []

    def step() -> None:
        if "8bit" not in preset.optimizer:
            adam.step()
        elif not quantized:
            quantized.extend(torch.zeros_like(p, dtype=torch.uint8) for p in trained for _ in range(2))
        adam.zero_grad()

    return step
