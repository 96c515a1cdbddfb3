"""Processes of one run choose alike, by the least of what they find free; on a CPU they share what is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub_lite.memory import Machine, estimate_memory
from adapterhub_lite.memory.plan import USABLE
from tests.checkout import ROOT

PROGRAM = """
import json, os, sys
from adapterhub_lite.memory import presets
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

base, folder, found = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
presets.available_memory = lambda: found[int(os.environ["RANK"])]
row = {"messages": [{"role": "user", "content": "y" * 20}, {"role": "assistant", "content": "x" * 20}]}
args = AdapterTrainingArguments(output_dir=folder, show_progress=False, use_cpu=True, rank=4, max_steps=1,
                                save_strategy="no", base_dtype="float32", per_device_train_batch_size=8, max_length=64)
trainer = AdapterTrainer(base, args, [row] * 32)
trainer.train()
choice = trainer.memory_choice
print(json.dumps([choice.preset.name, choice.batch_size, choice.accumulation]) + chr(10), end="", flush=True)
"""


def test_processes_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.memory.presets.available_memory", lambda: 8 * 2**30)
    assert Machine.present(device="cpu", world_size=4).memory_bytes == 2 * 2**30
    # Two machines with two processes each.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Machine.present(device="cpu", world_size=4).memory_bytes == 4 * 2**30


@pytest.mark.slow
def test_processes_choose_by_the_one_with_the_least_memory(tiny_base: Path, tmp_path: Path) -> None:
    def needed(rows: int) -> int:
        return estimate_memory(
            str(tiny_base), "lora-fp32", batch_size=rows, sequence_length=60, rank=4, world_size=2
        ).total

    tight = int(2 * (needed(8) - (needed(8) - needed(4)) / 8) / USABLE)
    program = tmp_path / "two.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(program), str(tiny_base), str(tmp_path / "run"), json.dumps([2 * tight, tight])],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    choices = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert choices == [["ddp", 4, 2]] * 2
