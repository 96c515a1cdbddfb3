"""SIGKILL at random instants: the run that goes on has the losses of the run that was never killed, bit for bit."""

import json
import multiprocessing
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

KILLS, KILLS_A_RUN = 20, 3
STEPS = 20
PROGRAM = f"""
from pathlib import Path
from transformers.trainer_utils import get_last_checkpoint
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
rows = [{{"messages": [{{"role": "user", "content": f"{{i}} times"}}, {{"role": "assistant", "content": "x" * (i % 9 + 1)}}]}}
        for i in range(40)]
args = AdapterTrainingArguments(output_dir=folder, max_steps={STEPS}, per_device_train_batch_size=4, save_steps=2,
                                show_progress=False, use_cpu=True, rank=4, lora_dropout=0.1)
trainer = AdapterTrainer(base, args, rows)
last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
trainer.train(resume_from_checkpoint=last)
trainer.save_adapter(Path(folder) / "adapter")
"""


@pytest.fixture
def start(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function folder -> process that runs `PROGRAM`, forked from one that has done the imports already."""
    # One thread: two may add in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapterhub_lite.training.trainer", "matplotlib.figure", "transformers"])

    def started(folder: Path) -> BaseProcess:
        process = context.Process(target=exec, args=(PROGRAM, {"base": str(tiny_base), "folder": str(folder)}))
        process.start()
        return process

    return started


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def finish(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0


def until_it_trains(process: BaseProcess, folder: Path) -> float:
    """Wait for the next line of `metrics.jsonl`, or for the end; returns when that was."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while process.is_alive() and (not metrics.exists() or metrics.stat().st_size == before):
        process.join(timeout=0.01)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_twenty_random_instants_ends_as_if_it_never_was(start: Any, tmp_path: Path) -> None:
    process = start(tmp_path / "whole")
    began = until_it_trains(process, tmp_path / "whole")
    finish(process)
    span = time.monotonic() - began
    wanted = losses(tmp_path / "whole")
    adapter = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert [step for step, _ in wanted] == list(range(1, STEPS + 1))
    chance, landed, runs = random.Random(4), [], 0
    while len(landed) < KILLS and runs < 3 * KILLS:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        for _ in range(KILLS_A_RUN):
            # Each start goes on from the last checkpoint, so that a run that was killed is killed again on its way.
            process = start(folder)
            trains = until_it_trains(process, folder)
            process.join(timeout=chance.uniform(0.0, 2.0 / KILLS_A_RUN) * span)
            if not process.is_alive():
                # The machine is faster now than it was for the whole run, or little was left to do.
                span = max(0.5 * span, min(span, time.monotonic() - trains))
                continue
            process.kill()
            process.join()
            landed.append(sorted(path.name for path in folder.glob("*")))
        if not (folder / "adapter").exists():
            finish(start(folder))
        assert losses(folder) == wanted, f"run {runs}, kills landed in {landed}"
        assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    print(f"{len(landed)} kills of {runs} runs landed in", *landed, sep="\n")
    assert len(landed) >= KILLS
