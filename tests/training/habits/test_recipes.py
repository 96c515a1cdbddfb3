"""What a command line adds to a run: early stopping, sample answers, sweeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training import TrainingRecipe, train_adapter
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.run.search_trainer import TRIALS_FILE, SearchTrainer, read_trials
from adapterhub_lite.training.sweep import Range, read_ranges, sweep

CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n) * 3}]}
    for n in range(24)
]
SMALL: dict[str, Any] = {"batch_size": 4, "rank": 2, "max_length": 64, "validation_split": 0.25}


def test_a_run_that_gets_worse_stops_and_keeps_the_best(tiny_base: Path, tmp_path: Path) -> None:
    # A rate at which it soon gets worse.
    recipe = TrainingRecipe(steps=30, save_steps=1, early_stopping=2, learning_rate=0.5, **SMALL)
    outcome = train_adapter(resolve_base(tiny_base), CHATS, tmp_path, recipe, show_progress=False)
    lines = [json.loads(line) for line in (outcome.folder.parent / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert len(evaluations) < 30
    best = min(loss for _, loss in evaluations)
    # The last evaluation is of what is kept.
    assert evaluations[-1][1] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("rows", [CHATS, [{"prompt": f"{n} = ", "completion": str(n)} for n in range(24)]])
def test_the_same_rows_are_answered_at_each_evaluation(
    tiny_base: Path,
    tmp_path: Path,
    rows: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    tensorboard = pytest.importorskip("tensorboardX")
    told: list[tuple[str, int | None]] = []
    write = tensorboard.SummaryWriter.add_text

    def and_tell(self: Any, tag: str, text: str, step: int | None = None) -> None:
        told.append((tag, step))
        write(self, tag, text, step)

    # Two writers within a second share a file, and the second one empties it: the calls are looked at.
    monkeypatch.setattr(tensorboard.SummaryWriter, "add_text", and_tell)
    recipe = TrainingRecipe(steps=4, save_steps=2, samples=2, report_to="tensorboard", **SMALL)
    outcome = train_adapter(resolve_base(tiny_base), rows, tmp_path, recipe, show_progress=False)
    run = outcome.folder.parent
    found = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {line["step"] for line in found} == {2, 4} and len({line["prompt"] for line in found}) == 2
    assert all(line.keys() == {"step", "prompt", "wanted", "found"} for line in found)
    assert any("step 2: " in record.getMessage() for record in caplog.records)
    assert {("samples", 2), ("samples", 4)} <= set(told)
    # It is the same run without them.
    again = train_adapter(resolve_base(tiny_base), rows, tmp_path, TrainingRecipe(**{**vars(recipe), "samples": 0}))
    assert again.folder == outcome.folder


def test_settings_that_look_at_evaluations_want_some() -> None:
    for name in ("early_stopping", "samples"):
        with pytest.raises(ConfigurationError, match="expected eval_data or validation_split"):
            TrainingRecipe(**{name: 2})
        with pytest.raises(ConfigurationError, match=f"{name} is -1"):
            TrainingRecipe(**{name: -1}, validation_split=0.1)


def test_ranges_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.yaml"
    path.write_text("rank: [2, 4]\nlearning_rate: {low: 1e-4, high: 1e-2, log: true}\nsteps: {low: 1, high: 3}\n")
    found = read_ranges(path)
    assert found["rank"] == Range(choices=(2, 4)) and found["learning_rate"] == Range(low=1e-4, high=1e-2, log=True)
    assert found["steps"] == Range(low=1, high=3)
    for text, words in (
        ("", "no ranges"),
        ("max_length: [32, 64]", "max_length cannot be searched"),
        ("bogus: [1]", "bogus cannot be searched"),
        ("rank: 4", "expected a list"),
        ("rank: {low: 8, high: 4}", "low at most high"),
        ("learning_rate: {low: 0, high: 1, log: true}", "expected a list"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=words):
            read_ranges(path)


def test_a_sweep_keeps_the_best_with_its_record(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    rows, base = load_rows(CHATS), resolve_base(tiny_base)
    ranges = {"rank": Range(choices=(2, 4)), "learning_rate": Range(low=1e-4, high=1e-1, log=True)}
    recipe = TrainingRecipe(steps=2, **SMALL)
    found = sweep(base, rows, tmp_path, recipe, ranges, 3, show_progress=False)
    best = min(found.trials, key=lambda one: float(one["objective"]))
    assert len(found.trials) == 3 and found.best.record.hyperparameters["rank"] == best["settings"]["rank"]
    assert found.best.record.hyperparameters["learning_rate"] == pytest.approx(best["settings"]["learning_rate"])
    kept = [path.name for path in found.best.folder.parent.glob("best-of-*")]
    assert kept == [found.best.folder.name] and (found.best.folder.parent / TRIALS_FILE).exists()
    with pytest.raises(ConfigurationError, match="There is a sweep"):
        sweep(base, rows, tmp_path, recipe, ranges, 3)
    with pytest.raises(ConfigurationError, match="There is a sweep"):
        sweep(base, rows, tmp_path, recipe, {"rank": Range(choices=(2, 4))}, 5)
    with pytest.raises(ConfigurationError, match="rank is 0"):
        sweep(base, rows, tmp_path, recipe, {"rank": Range(choices=(0, 4))}, 1)
    with pytest.raises(ConfigurationError, match="give eval_data or validation_split"):
        sweep(base, rows, tmp_path, TrainingRecipe(steps=1), ranges, 1)


def test_an_interrupted_sweep_goes_on(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    rows, base = load_rows(CHATS), resolve_base(tiny_base)
    ranges = {"learning_rate": Range(low=1e-4, high=1e-1, log=True)}
    recipe = TrainingRecipe(steps=2, **SMALL)
    made: list[int] = []

    def interrupted(trainer: SearchTrainer, trial: Any, output: Any) -> None:
        made.append(trial.number)
        if len(made) == 3:
            raise KeyboardInterrupt
        keep(trainer, trial, output)

    keep = SearchTrainer.keep_trial
    monkeypatch.setattr(SearchTrainer, "keep_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(base, rows, tmp_path, recipe, ranges, 4, show_progress=False)
    (run,) = tmp_path.glob("sweep-*")
    before = read_trials(run)
    assert len(before) == 2
    found = sweep(base, rows, tmp_path, recipe, ranges, 4, show_progress=False)
    assert found.trials[:2] == before and len(found.trials) == 4
    rates = [one["settings"]["learning_rate"] for one in found.trials]
    assert len(set(rates)) == 4
    best = min(found.trials, key=lambda one: float(one["objective"]))
    assert found.best.record.hyperparameters["learning_rate"] == pytest.approx(best["settings"]["learning_rate"])
    assert [path.name for path in run.glob("best-of-*")] == [best["adapter"]]
