"""SIGTERM to a run of the command line: what is done is saved, nothing half-trained is kept, the same command goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

STEPS = 500  # far more than are done while the test looks for the first


def started(home: Path, base: Path, rows: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "adapterhub_lite", "train", "sums", "--data", str(rows)]
    command += ["--base", str(base), "--steps", str(STEPS), "--batch-size", "2", "--rank", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_stopped_run_is_not_taken_for_a_finished_one(tiny_base: Path, home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(8)))
    run = started(home, tiny_base, rows)
    while not list(home.glob("runs/sums/*/metrics.jsonl")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended before its first step: {run.wait(timeout=0.05)}")
    run.send_signal(signal.SIGTERM)
    said, complaint = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, complaint
    assert f"of {STEPS} is saved in" in complaint and "The same command goes on from there." in complaint
    assert said == "" and "Traceback" not in complaint
    assert list(home.glob("runs/sums/*/adapter")) == [] and len(list(home.glob("runs/sums/*/checkpoint-*"))) == 1
    again = started(home, tiny_base, rows)
    said, complaint = again.communicate()
    assert again.returncode == 0, complaint
    manifest = json.loads(said)
    assert manifest["version"] == 1 and manifest["training"]["steps"] == STEPS
    (metrics,) = home.glob("runs/sums/*/metrics.jsonl")
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
