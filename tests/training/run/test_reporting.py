"""`report_to`: what a run says of itself reaches TensorBoard and trackio, which need no account."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.recipe import _reporters
from adapterhub_lite.training.settings import TrainingRecipe
from tests.checkout import ROOT


def test_tensorboard_gets_the_losses_of_the_log(make_trainer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(report_to=["tensorboard"], max_steps=2)
    trainer.train()
    written: dict[str, list[float]] = {}
    for file in (tmp_path / "board").rglob("events*"):
        content, place = file.read_bytes(), 0
        while place < len(content):  # length, its checksum, the event, its checksum
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                written.setdefault(value.tag, []).append(value.simple_value)
            place += 16 + length
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert written["train/loss"] == pytest.approx(logged)


@pytest.mark.slow
def test_trackio_gets_the_losses_of_a_run_from_the_command_line(tiny_base: Path, home: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(4)))
    command = ["train", "sums", "--data", str(rows), "--base", str(tiny_base), "--steps", "2", "--batch-size", "2"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "adapterhub_lite", *command, "--report-to", "trackio", "--json"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        lines = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    told = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(told) == 2
    again = subprocess.run(
        [sys.executable, "-m", "adapterhub_lite", *command, "--json"], env=environment, capture_output=True, text=True
    )
    assert len(list((home / "runs" / "sums").iterdir())) == 1, "who is told does not make it another run"
    assert again.returncode == 0, again.stderr


def test_who_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="report_to has 'nobody'"):
        TrainingRecipe(report_to="tensorboard,nobody")
    monkeypatch.setattr("adapterhub_lite.training.recipe.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install trackio"):
        _reporters("trackio")
    assert _reporters("none") == []
