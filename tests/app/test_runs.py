"""A run's card: what it does, for how long, how far it is, and what went wrong."""

from pathlib import Path

import pytest

from adapterhub_app.display.runs import SKELETON, describe_run
from adapterhub_app.tabs.run_panel import usual_seconds
from adapterhub_lite.runs.folder import METRICS_FILE, Run
from adapterhub_lite.runs.state import RunState, now, write_state


def run_in(folder: Path, *, alive: bool = True, **more: object) -> Run:
    state = RunState(
        **{"name": "own", "stage": "preparing", "created": now(), "changed": now(), "since": now(), **more}
    )  # type: ignore[arg-type]
    write_state(folder, state)
    return Run(folder, state, alive)


def test_a_stage_without_steps_says_for_how_long_and_how_long_the_last_time(tmp_path: Path) -> None:
    run = run_in(tmp_path / "runs" / "own" / "b")
    assert usual_seconds(run) is None
    run_in(tmp_path / "runs" / "own" / "a", stage="finished", took={"preparing": 14.2, "training": 99.0})
    assert usual_seconds(run) == 14.2
    card = describe_run(run, usual_seconds(run))
    assert "reads the rows and loads the base, for 0 s, 14 s the last time" in card
    assert SKELETON in card and "<progress aria-label" in card, "it goes on, and nobody knows how far it is"


def test_a_run_that_trains_says_how_far_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "own" / "c"
    run = run_in(folder, stage="training", step=5, steps=20, seconds_left=30.0)
    assert usual_seconds(run) is None
    (folder / METRICS_FILE).write_text('{"step": 5, "loss": 1.25, "tokens_per_second": 1234.5}\n')
    card = describe_run(run)
    assert 'value="25.0" aria-label="5 of 20 steps"' in card and "1.25" in card and "1,234 tokens/s" in card
    assert SKELETON not in card and "the last time" not in card


@pytest.mark.parametrize("stage", ["failed", "preparing"])
def test_what_went_wrong_is_said_as_a_problem_and_nothing_seems_to_go_on(tmp_path: Path, stage: str) -> None:
    run = run_in(tmp_path / "runs" / "own" / "d", alive=False, stage=stage, problem="Row 3 is <b>empty</b>.")
    card = describe_run(run)
    assert 'role="alert">Row 3 is &lt;b&gt;empty&lt;/b&gt;.' in card and SKELETON not in card
    assert f"stage-{'failed' if stage == 'failed' else 'interrupted'}" in card and "<progress aria-label" not in card
