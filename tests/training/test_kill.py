"""SIGKILL at random instants: the run that goes on has the losses of the run that was never killed, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

INSTANTS = 20
PROGRAM = """
import sys
from pathlib import Path
from transformers.trainer_utils import get_last_checkpoint
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
base, folder = sys.argv[1:]
rows = [{"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
        for i in range(40)]
args = AdapterTrainingArguments(output_dir=folder, max_steps=30, per_device_train_batch_size=4, save_steps=2,
                                show_progress=False, use_cpu=True, rank=4, lora_dropout=0.1)
trainer = AdapterTrainer(base, args, rows)
last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
trainer.train(resume_from_checkpoint=last)
trainer.save_adapter(Path(folder) / "adapter")
"""


def start(base: Path, folder: Path) -> "subprocess.Popen[bytes]":
    # One thread: two may add in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(base), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def finish(process: "subprocess.Popen[bytes]") -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_run_killed_at_twenty_random_instants_ends_as_if_it_never_was(tiny_base: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    finish(start(tiny_base, tmp_path / "whole"))
    span = time.monotonic() - began
    wanted = losses(tmp_path / "whole")
    adapter = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    chance = random.Random(4)
    killed = 0
    for number in range(INSTANTS):
        folder = tmp_path / f"killed-{number}"
        process = start(tiny_base, folder)
        try:
            # From the first metrics on, so that most kills land in steps and in saves, not in the imports.
            process.wait(timeout=chance.uniform(0.3, 1.0) * span)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        if not (folder / "adapter").exists():
            finish(start(tiny_base, folder))
        assert losses(folder) == wanted, f"killed at instant {number}"
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert killed >= INSTANTS // 2
