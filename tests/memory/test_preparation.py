"""A base made ready keeps its dtypes, and every single-device preset trains it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.memory import MEMORY_PRESETS, find_preset, prepare_for_training
from adapterhub_lite.memory.tracing import LiveBytes

SINGLE = [name for name, preset in MEMORY_PRESETS.items() if preset.strategy == "single"]


def loaded(base: Path, name: str) -> Any:
    preset = find_preset(name)
    model = load_base_model(base, dtype=preset.torch_dtype, quantization_config=preset.quantization_config())
    return prepare_for_training(model, preset)


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", ["qlora-nf4", "lora-int8"])
def test_preparation_is_smaller_than_pefts(tiny_base: Path, name: str) -> None:
    ours = loaded(tiny_base, name)
    theirs = prepare_model_for_kbit_training(loaded(tiny_base, name), use_gradient_checkpointing=False)
    head = ours.get_output_embeddings().weight
    assert head.dtype == torch.bfloat16
    assert theirs.get_output_embeddings().weight.dtype == torch.float32
    assert parameter_bytes(ours) < 0.8 * parameter_bytes(theirs)


@pytest.mark.parametrize("name", ["qlora-nf4", "lora-int8"])
def test_preparing_copies_nothing_into_fp32_where_pefts_does(tiny_base: Path, name: str) -> None:
    def peak(prepare: Any) -> int:
        preset = find_preset(name)
        model = load_base_model(tiny_base, dtype=preset.torch_dtype, quantization_config=preset.quantization_config())
        live = LiveBytes([*model.parameters(), *model.buffers()])
        with live:
            prepare(model, preset)
        return live.peak

    # Ours are copies in 16 bits that take the place of the mapped weights file, one tensor at a time.
    theirs = peak(lambda model, preset: prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    assert peak(prepare_for_training) < 0.6 * theirs


@pytest.mark.parametrize("name", SINGLE)
def test_every_single_device_preset_trains(tiny_base: Path, name: str) -> None:
    preset = find_preset(name)
    if preset.mixed_precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("loss scaling in fp16 needs a GPU")
    torch.manual_seed(0)
    model = loaded(tiny_base, name)
    if preset.trains == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    elif preset.trains == "head":
        model.get_output_embeddings().requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(0, 256, (4, 24))
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
