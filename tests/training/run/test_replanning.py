"""Memory that runs out in a run: refused with what would fit, or, when allowed, gone on with less from where it was."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import OutOfMemoryError
from tests.checkout import ROOT

SMALL = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "preflight": False}


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def too_small(trainer: Any, rows: int, from_step: int = 0) -> None:
    """Make the device too small for more than `rows` rows at a time, from a step on."""

    def measure(module: Any, given: Any, named: dict[str, Any]) -> None:
        positions = named.get("position_ids")
        count = len(named["input_ids"]) if positions is None else int((positions == 0).sum())
        if module.training and count > rows and trainer.state.global_step >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.get_base_model().model.register_forward_pre_hook(measure, with_kwargs=True)


@pytest.mark.parametrize(("from_step", "saving"), [(0, {}), (3, {}), (3, {"save_strategy": "steps", "save_steps": 2})])
def test_it_goes_on_with_fewer_rows_and_the_same_losses(
    make_trainer: Any, from_step: int, saving: dict[str, Any]
) -> None:
    plenty = make_trainer("plenty", **SMALL)
    plenty.train()
    tight = make_trainer("tight", **SMALL, **saving, on_out_of_memory="replan")
    said: list[str] = []
    tight.memory_report.say = said.append
    too_small(tight, 1, from_step)
    tight.train()
    assert tight.args.per_device_train_batch_size == 1 and tight.args.gradient_accumulation_steps == 4
    assert tight.state.global_step == 6
    assert losses(tight) == pytest.approx(losses(plenty), rel=1e-4)
    assert [line for line in said if "4 rows at a time: 2 rows" in line] and "2 rows at a time: 1 rows" in " ".join(
        said
    )
    assert "memory ran out" in tight.record().loss_backend["memory"]


def test_the_preflight_finds_it_too_and_then_activations_are_made_again(make_trainer: Any) -> None:
    trainer = make_trainer(**{**SMALL, "preflight": True}, on_out_of_memory="replan")
    decoder = trainer.model.get_base_model().model

    def measure(module: Any, given: Any, named: dict[str, Any]) -> None:
        if module.training and not module.is_gradient_checkpointing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    decoder.register_forward_pre_hook(measure, with_kwargs=True)
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 1 and trainer.args.activation_checkpointing
    assert trainer.record().steps == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "per_device_train_batch_size=2 and gradient_accumulation_steps=2"),
        ({"per_device_train_batch_size": 1}, "Set activation_checkpointing=True"),
        ({"per_device_train_batch_size": 1, "activation_checkpointing": True}, "memory_preset='qlora-nf4-gc'"),
        (
            {"per_device_train_batch_size": 1, "activation_checkpointing": True, "on_out_of_memory": "replan"},
            "or shorter rows",
        ),
    ],
)
def test_it_stops_and_says_what_would_fit(make_trainer: Any, given: dict[str, Any], words: str) -> None:
    trainer = make_trainer(**{**SMALL, **given})
    too_small(trainer, 0)
    with pytest.raises(OutOfMemoryError, match="Memory ran out on cpu") as caught:
        trainer.train()
    assert words in str(caught.value)


def test_another_error_is_left_alone(make_trainer: Any) -> None:
    trainer = make_trainer(**SMALL, on_out_of_memory="replan")

    def fail(*_: Any) -> None:
        raise RuntimeError("something else")

    trainer.model.get_base_model().model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()


def test_the_checkpoint_made_for_it_is_whole(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(**SMALL, on_out_of_memory="replan")
    too_small(trainer, 2, from_step=2)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "hashes.json").exists()


def test_auto_find_batch_size_finds_the_rows_that_fit(make_trainer: Any) -> None:
    trainer = make_trainer(**{**SMALL, "preflight": True}, auto_find_batch_size=True)
    too_small(trainer, 2)
    trainer.train()
    assert trainer.state.train_batch_size <= 2 and trainer.state.global_step == 6
    assert len(losses(trainer)) == 6
    hopeless = make_trainer("hopeless", **SMALL, auto_find_batch_size=True)
    too_small(hopeless, 0)
    with pytest.raises(OutOfMemoryError, match=r"with 1 rows of up to .* Set activation_checkpointing=True"):
        hopeless.train()


NARROW = """
import resource, sys
from adapterhub_lite.errors import OutOfMemoryError
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
base, folder = sys.argv[1:]
rows = [{"text": "x" * (20 + 4 * i)} for i in range(100)]
args = AdapterTrainingArguments(output_dir=folder, max_steps=100, per_device_train_batch_size=64, rank=4, use_cpu=True,
                                show_progress=False, memory_preset="lora-fp32", learning_rate=1e-4)
trainer = AdapterTrainer(base, args, rows)
trainer.model.train()(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
try:
    trainer.train()
except OutOfMemoryError as error:
    print(trainer.state.global_step, error)
"""


@pytest.mark.slow
def test_a_process_that_may_not_have_more_memory_is_told_what_fits(tiny_base: Path, tmp_path: Path) -> None:
    """The longest batch needs more than the 40 MiB that the process may still ask the system for."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NARROW, str(tiny_base), str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()[-1]
    assert said.startswith("0 The longest batch of this run (64 rows of up to 417 tokens) does not fit on cpu"), said
    assert re.search(r"(1|2|4|8|16|32) rows would: set per_device_train_batch_size=\1 and", said), said
