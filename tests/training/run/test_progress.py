"""What a run shows and leaves: the bar with its figures, the plot, and counts that go on after a resume."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console
from transformers import TrainerCallback

from adapterhub_lite import devices
from adapterhub_lite.errors import NonFiniteLossError
from adapterhub_lite.training.run import progress
from adapterhub_lite.training.run.measurement import resident_bytes


class Shot(TrainerCallback):
    """Keeps what the bar looks like after each step, as a terminal would show it."""

    def __init__(self, bar: progress.ProgressCallback) -> None:
        self.bar, self.seen = bar, []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if self.bar.bar is not None:
            paper = Console(file=io.StringIO(), width=200)
            paper.print(self.bar.bar.get_renderable())
            self.seen.append(paper.file.getvalue())  # type: ignore[attr-defined]


def test_the_bar_shows_steps_loss_speed_memory_and_time_left(make_trainer: Any) -> None:
    trainer = make_trainer(show_progress=True)
    bar = trainer.progress
    bar.console = Console(file=io.StringIO(), force_terminal=True, width=200)
    shot = Shot(bar)
    trainer.add_callback(shot)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for step, (picture, loss) in enumerate(zip(shot.seen, losses, strict=False)):
        # The loss of a step is logged before the next one moves the bar.
        assert re.search(rf"[{step}{step + 1}]/4 +loss {loss:.4f}  [\d,]+ tokens/s  [\d,]+ MiB \S*:\S+", picture), (
            picture
        )
    assert len(shot.seen) >= 4 and bar.bar is None
    assert "memory: lora-fp32" in bar.console.file.getvalue()


def test_a_file_gets_a_line_now_and_then(make_trainer: Any) -> None:
    trainer = make_trainer(show_progress=True)
    trainer.progress.console = Console(file=io.StringIO(), width=200)
    trainer.progress.seconds_between_lines = 0.0
    trainer.train()
    lines = [line for line in trainer.progress.console.file.getvalue().splitlines() if line.startswith("training")]
    pattern = r"training {}/4  loss \d+\.\d{{4}}  [\d,]+ tokens/s  [\d,]+ MiB"
    assert len(lines) == 4 and all(re.fullmatch(pattern.format(n + 1), line) for n, line in enumerate(lines)), lines
    trainer.progress.seconds_between_lines = 1e9
    before = trainer.progress.console.file.getvalue().count("training ")
    trainer.train()
    assert trainer.progress.console.file.getvalue().count("training ") == before


def test_the_plot_has_a_line_for_each_loss(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 3.0 - step} for step in range(3)]
    progress.draw_losses(history, tmp_path / "one.png")
    progress.draw_losses([*history, {"step": 1, "eval_loss": 2.5}, {"step": 2, "eval_loss": 1.5}], tmp_path / "two.png")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert one.shape == two.shape and (one != two).any()
    assert progress.draw_losses([], tmp_path / "none.png") is None


def test_without_matplotlib_there_is_no_picture_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    progress.draw_losses([{"step": 1, "loss": 3.0}], tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists() and "matplotlib is not installed" in caplog.text


@pytest.mark.skipif(not devices.trim_heap(), reason="the heap is not glibc's")
def test_the_plot_is_no_part_of_a_runs_peak(tmp_path: Path) -> None:
    """What a run has freed is given back before the plot is drawn, whose own memory would come on top of it."""
    blocks = [bytes(4_000) for _ in range(50_000)]
    kept = bytes(4_000)  # above the others in the heap, so that they are not given back when they are freed
    before = resident_bytes()
    del blocks
    progress.draw_losses([{"step": 1, "loss": 3.0}], tmp_path / "one.png")
    assert resident_bytes() < before - 100_000_000 and kept


def test_a_run_that_was_stopped_leaves_its_plot(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_resumed_run_counts_on_from_its_checkpoint(make_trainer: Any, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer("whole", **settings, max_steps=6)
    whole.train()
    # A learning rate that does not depend on the number of steps: the first half is the same run.
    half = make_trainer("half", **settings, max_steps=4)
    half.train()
    kept = json.loads((tmp_path / "half" / "checkpoint-4" / "trainer_state.json").read_bytes())
    counted = kept["stateful_callbacks"]["MetricsCallback"]["attributes"]
    assert counted["tokens"] == half.meter.tokens and counted["seconds"] > 0
    again = make_trainer("half", **settings, max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.meter.tokens == whole.meter.tokens
    assert again.meter.seconds > counted["seconds"] and again.record().wall_seconds > counted["seconds"]
    fresh = make_trainer("fresh", **settings, max_steps=2)
    fresh.train()
    tokens = fresh.meter.tokens
    fresh.train()
    assert fresh.meter.tokens == tokens
