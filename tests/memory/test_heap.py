"""What was freed goes back to the system before the next block runs, under presets that go for memory."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.memory import find_preset, give_back_freed_memory, prepare_for_training
from adapterhub_lite.memory.preparation import SLACK_BYTES
from adapterhub_lite.training.run.measurement import PeakMemory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is asked to give memory back")


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def fragmented(size: int) -> list[torch.Tensor]:
    """Free `size` bytes in pieces that the heap keeps, because something small lives above each; returns these.

    First, the holes that are there already are filled.
    """
    filled = [torch.ones(2**16, dtype=torch.uint8) for _ in range(size // 2**16)]
    pieces = [(torch.ones(2**16, dtype=torch.uint8), torch.ones(64)) for _ in range(size // 2**16)]
    return [*filled, *(kept for _, kept in pieces)]


def ready(base: Path, name: str) -> Any:
    preset = find_preset(name)
    model = load_base_model(base, dtype=preset.torch_dtype, quantization_config=preset.quantization_config())
    give_back_freed_memory(prepare_for_training(model, preset), preset)
    return model


@pytest.mark.parametrize("name", ["lora-bf16-gc", "qlora-nf4"])
def test_a_forward_pass_gives_back_what_was_freed(tiny_base: Path, name: str) -> None:
    model = ready(tiny_base, name)
    kept, before = fragmented(3 * SLACK_BYTES), resident()
    model(torch.ones(1, 4, dtype=torch.long))
    assert before - resident() > 2 * SLACK_BYTES
    assert kept


def test_a_backward_pass_gives_back_what_was_freed(tiny_base: Path) -> None:
    """Without checkpointing, which runs the blocks again there."""
    model = ready(tiny_base, "qlora-nf4")
    states = model.get_input_embeddings()(torch.ones(1, 4, dtype=torch.long)).detach().requires_grad_()
    loss = model(inputs_embeds=states).logits.sum()
    kept, before = fragmented(3 * SLACK_BYTES), resident()
    loss.backward()
    assert before - resident() > 2 * SLACK_BYTES
    assert kept and states.grad is not None


def test_a_copy_of_the_model_gives_back_too(tiny_base: Path) -> None:
    model = copy.deepcopy(ready(tiny_base, "lora-bf16-gc"))
    kept, before = fragmented(3 * SLACK_BYTES), resident()
    model(torch.ones(1, 4, dtype=torch.long))
    assert before - resident() > 2 * SLACK_BYTES
    assert kept


def test_what_an_earlier_run_freed_is_no_part_of_the_next_ones_prediction() -> None:
    kept, there = fragmented(3 * SLACK_BYTES), resident()
    assert there - PeakMemory.before(torch.device("cpu"), None) > 2 * SLACK_BYTES
    assert kept


def test_presets_that_go_for_speed_have_no_hook(tiny_base: Path) -> None:
    model = ready(tiny_base, "lora-bf16")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
