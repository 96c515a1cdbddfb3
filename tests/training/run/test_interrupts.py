"""Ctrl-C to a run of the command line, as a real signal at a known moment: what it says is true, and its advice works.

In each program a function of the run sends SIGINT to its own process when it is called for the n-th time.
"""

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from adapterhub_lite import AdapterRegistry, GenerationRequest, InferenceEngine
from tests.checkout import ROOT

STEPS, SAVE = 10, 5
PROGRAM = """
import os, signal, sys
from importlib import import_module
os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background inherit that it is ignored
if where:
    path, name = where.split(":")
    *classes, name = name.split(".")
    owner = import_module(path)
    for part in classes:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), 0
    def signalling(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return whole(*args, **kwargs)
    setattr(owner, name, signalling)
from adapterhub_lite.cli.main import main
sys.argv = ["adapterhub-lite", *words]
main()
"""
STEP = "adapterhub_lite.training.trainer:AdapterTrainer.training_step"
GUARD = "adapterhub_lite.training.run.guard:RunGuard"


class Ended(NamedTuple):
    code: int
    said: str


class Runs:
    """Runs of one command in one home."""

    def __init__(self, home: Path, base: Path, rows: Path) -> None:
        self.home, self.base, self.rows = home, base, rows
        # One thread: two may add in another order.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["adapterhub_lite.training.trainer", "adapterhub_lite.cli.main"])

    def words(self, *more: str) -> list[str]:
        return [
            "train", "sums", "--data", str(self.rows), "--base", str(self.base), "--steps", str(STEPS), "--batch-size", "2",
            "--rank", "2", "--save-steps", str(SAVE), "--home", str(self.home), *more,
        ]  # fmt: skip

    def run(self, where: str = "", at: int = 1, times: int = 1, words: list[str] | None = None) -> Ended:
        said = self.home / "said"
        told = {"where": where, "at": at, "times": times, "words": words or self.words(), "said": str(said)}
        process = self.context.Process(target=exec, args=(PROGRAM, told))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ended(process.exitcode, said.read_text())

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.home.glob("runs/sums/*/checkpoint-*"))

    def losses(self) -> dict[int, float]:
        (metrics,) = self.home.glob("runs/sums/*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def weights(self) -> Any:
        registry = AdapterRegistry(self.home)
        return load_file(registry.file(registry.resolve("sums"), "adapter_model.safetensors"))


@pytest.fixture
def runs(home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(24)))
    home.mkdir(exist_ok=True)
    return Runs(home, tiny_base, rows)


def advice(said: str) -> list[str]:
    found = re.search(r"To keep what is there as it is: adapterhub-lite (.*)$", said, re.MULTILINE)
    assert found, said
    return shlex.split(found[1])


@pytest.mark.slow
def test_what_one_interrupt_advises_works(runs: Runs, tmp_path: Path) -> None:
    """The checkpoint is added and served; the run that goes on is the run that was never interrupted."""
    ended = runs.run(STEP, at=3 + 2)  # two calls belong to the trial of the longest batch
    assert ended.code == 130 and "Traceback" not in ended.said, ended.said
    assert "Stopping: this step is finished and saved first. Ctrl-C again ends at once." in ended.said
    step = int(re.search(r"Step (\d+) of 10 is saved in", ended.said)[1])  # type: ignore[index]
    assert "The same command goes on from there." in ended.said
    assert runs.checkpoints() == [f"checkpoint-{step}"] and 1 <= step < SAVE
    added = runs.run(words=advice(ended.said))
    assert added.code == 0 and "sums:1" in added.said, added.said
    registry = AdapterRegistry(runs.home)
    kept = registry.resolve("sums")
    assert kept.training is not None and kept.training.steps == step
    with InferenceEngine.from_base(runs.base, registry=registry, device="cpu") as engine:
        result = engine.generate(GenerationRequest(prompt="3?", adapter="sums:1", max_new_tokens=2))
    assert result.adapter_digest == kept.digest
    assert runs.run().code == 0
    resumed, losses = runs.weights(), runs.losses()
    whole = Runs(tmp_path / "whole", runs.base, runs.rows)
    whole.home.mkdir()
    assert whole.run().code == 0
    assert whole.losses() == losses and sorted(losses) == list(range(1, STEPS + 1))
    for name, tensor in whole.weights().items():
        assert tensor.equal(resumed[name])


EVALUATED = ("--validation-split", "0.25")
MOMENTS: dict[str, tuple[str, int, int, tuple[str, ...], str, list[str]]] = {
    "reading rows": ("adapterhub_lite.training.recipe:rows_for", 1, 1, (), "before the run began", []),
    "loading the model": ("adapterhub_lite.training.model.assembly:load_for", 1, 1, (), "nothing of the run is saved yet", []),
    "twice in the first step": (STEP, 3, 2, (), "nothing of the run is saved yet", []),
    "the trial before the first step": (f"{GUARD}._fly", 1, 1, (), "Step 1 of 10 is saved", ["checkpoint-1"]),
    "twice after a checkpoint": (STEP, 9, 2, (), "Step 5 of 10 is saved", ["checkpoint-5"]),
    "an evaluation": (f"{GUARD}.on_prediction_step", 1, 1, EVALUATED, "Step 5 of 10 is saved", ["checkpoint-5"]),
    "twice in an evaluation": (f"{GUARD}.on_prediction_step", 1, 2, EVALUATED, "nothing of the run is saved yet", []),
    "saving": ("adapterhub_lite.training.run.checkpoints:seal", 1, 1, (), "Step 5 of 10 is saved", ["checkpoint-5"]),
    "twice in saving": ("adapterhub_lite.training.run.checkpoints:seal", 1, 2, (), "nothing of the run is saved yet", []),
    "twice in the second saving": ("adapterhub_lite.training.run.checkpoints:seal", 2, 2, (), "Step 5 of 10", ["checkpoint-5"]),
    "writing the adapter": (
        "adapterhub_lite.training.run.record:write_adapter", 1, 1, (), "All 10 steps are saved",
        ["checkpoint-10", "checkpoint-5"],
    ),
    "adding it": (
        "adapterhub_lite.registry.registry:AdapterRegistry.add", 1, 1, (), "The run is finished",
        ["checkpoint-10", "checkpoint-5"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_said_is_true_at_every_moment(moment: str, runs: Runs) -> None:
    where, at, times, more, said, left = MOMENTS[moment]
    ended = runs.run(where, at, times, runs.words(*more))
    assert ended.code == 130 and said in ended.said and "Traceback" not in ended.said, ended
    assert runs.checkpoints() == left
    assert ("To keep what is there" in ended.said) is bool(left and moment != "adding it")
    if moment in ("an evaluation", "saving", "twice in the second saving", "adding it", "loading the model"):
        again = runs.run(words=runs.words(*more))
        assert again.code == 0 and "sums:1" in again.said, again.said
        assert sorted(runs.losses()) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_an_adapter_that_began_with_part_of_the_base_is_not_advised_to_be_kept(runs: Runs) -> None:
    words = runs.words("--init-lora", "pissa")
    ended = runs.run(STEP, 5, words=words)
    assert "The same command goes on from there." in ended.said and "To keep" not in ended.said
    again = runs.run(words=words)
    assert again.code == 0 and "sums:1" in again.said, again.said


@pytest.mark.slow
def test_a_program_without_checkpoints_keeps_one_and_hears_the_interrupt(tiny_base: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
rows = [{{"prompt": str(n), "completion": f"is {{n}}"}} for n in range(8)]
args = AdapterTrainingArguments(output_dir={str(tmp_path / "run")!r}, max_steps=5, save_strategy="no", use_cpu=True,
                                preflight=False, show_progress=False, report_to="none")
class Interrupted(AdapterTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(*args, **kwargs)
trainer = Interrupted({str(tiny_base)!r}, args, rows)
try:
    trainer.train()
except KeyboardInterrupt as interrupt:
    print(interrupt)
signal.signal(signal.SIGINT, lambda *_: print("its own"))
print(trainer.train(resume_from_checkpoint=True).global_step)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("Step 2 of 5 is saved in") for line in lines) and lines[-1] == "5", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_several_processes_stop_together(times: int, runs: Runs) -> None:
    """The terminal reaches the one that was started; it hands the first on and ends the others by the second."""
    command = [sys.executable, "-W", "ignore", "-m", "adapterhub_lite"]
    command += runs.words("--devices", "2", "--save-steps", "1000", "--steps", "2000")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(runs.home.glob("runs/sums/*/metrics.jsonl")):
        try:
            pytest.fail(f"ended before its first step: {process.wait(timeout=0.05)}")
        except subprocess.TimeoutExpired:
            continue
    children = _children(process.pid)
    assert len(children) == 2
    assert process.stderr is not None
    said = ""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        while "Stopping" not in said:
            said += process.stderr.readline()
    said += process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    if times == 1:
        (checkpoint,) = runs.checkpoints()
        assert f"Step {checkpoint.removeprefix('checkpoint-')} of 2000 is saved" in said and advice(said)
        added = runs.run(words=advice(said))
        assert added.code == 0, added.said
    assert said.count("The same command") == 1


def _children(parent: int) -> list[str]:
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
