"""A dry run of the whole step on fake tensors: every layer, the loss's buffers and the optimizer, nothing allocated.

Slower than the estimate (seconds to a minute) and bound to no formula: parameters, activations, gradients and states
are counted as they would be allocated.
"""

import warnings
from typing import Any

import torch

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.estimate import (
    OVERHEAD_BYTES,
    MemoryEstimate,
    ModelFacts,
    Workload,
    estimate,
    read_config,
    score_bytes,
)
from adapterhub_lite.memory.preparation import prepare_for_training
from adapterhub_lite.memory.presets import MemoryPreset, find_preset
from adapterhub_lite.memory.tracing import LiveBytes, build_model, put_lora


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
    config = read_config(base)
    reckoned = estimate(ModelFacts(config), preset, workload)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        model = build_model(config, depth=None, dtype=preset.torch_dtype)
        prepare_for_training(model, preset)
        trained_dtype = torch.float32 if preset.trained_dtype == "float32" else preset.torch_dtype
        if preset.trains == "lora":
            put_lora(model, workload.rank, preset.torch_dtype, workload.target_modules)
        elif preset.trains == "head":
            model.get_output_embeddings().requires_grad_(True)
        model.train()
        peak = _peak_of_two_steps(model, preset, workload, reckoned)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The stand-in adapter is in the base's dtype; its weights, gradients and two moments are held in `trained_dtype`.
    wider = 4 * trained * (trained_dtype.itemsize - preset.torch_dtype.itemsize) if preset.trains == "lora" else 0
    weights = reckoned.components["weights"] + reckoned.components["quantization"]
    # The model runs torch's attention here, and the trainer's own for short rows on a CPU.
    scores = score_bytes(ModelFacts(config).shape(workload.target_modules), workload)
    return peak + weights + wider + scores + OVERHEAD_BYTES.get(workload.device, 0)


def _peak_of_two_steps(model: Any, preset: MemoryPreset, workload: Workload, reckoned: MemoryEstimate) -> int:
    """Peak bytes beyond the base's weights; the second step has the optimizer's states from the start."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    live = LiveBytes([*frozen, *model.buffers()])
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    if preset.trains == "all":
        live.leave_out(trained)
    with live:
        for _ in range(2):
            ids = torch.zeros((workload.batch_size, workload.sequence_length), dtype=torch.long)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            buffers = torch.empty(reckoned.components["loss"] // 2, dtype=torch.bfloat16)
            del buffers
            if states.requires_grad:
                states.backward(torch.zeros_like(states))
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
    return live.peak
