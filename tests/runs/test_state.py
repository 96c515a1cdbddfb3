"""A run's state on disk: whole or old, held by one process, and told apart from a run whose process is gone."""

import json
import multiprocessing
from pathlib import Path

import pytest

from adapterhub_lite.errors import DataError, RegistryError, RunStoppedError, UnknownNameError
from adapterhub_lite.runs.folder import Run, find_run, last_took, list_runs, read_run, seconds_since
from adapterhub_lite.runs.state import RunState, is_held, keeping, note, note_added, now, read_state, write_state


def state(name: str = "own", **more: object) -> RunState:
    return RunState(**{"name": name, "stage": "training", "created": now(), "changed": now(), **more})  # type: ignore[arg-type]


def run_in(folder: Path) -> Run:
    found = read_run(folder)
    assert found is not None
    return found


def hold(folder: str, held: object, leave: object) -> None:
    with keeping(Path(folder), state()):
        held.set()  # type: ignore[attr-defined]
        leave.wait()  # type: ignore[attr-defined]


def test_a_run_is_alive_as_long_as_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), held, leave), daemon=True)
    process.start()
    assert held.wait(60)
    assert is_held(tmp_path) and run_in(tmp_path).is_under_way and run_in(tmp_path).stage == "training"
    process.kill()
    process.join()
    assert not is_held(tmp_path)
    found = run_in(tmp_path)
    assert found.stage == "interrupted" and not found.is_under_way


def test_a_stage_that_is_over_says_how_long_it_took_and_one_that_was_broken_off_does_not(tmp_path: Path) -> None:
    begun = state(stage="preparing", created="2026-01-01T00:00:00+00:00", base_fingerprint="f")
    with keeping(tmp_path / "own" / "one", begun) as keeper:
        keeper.update(stage="training")
        keeper.update(step=3)
        took = keeper.state.took["preparing"]
    assert took == pytest.approx(seconds_since(begun.created), abs=60) and "training" not in keeper.state.took
    note(tmp_path / "own" / "one", stage="stopped")
    first = run_in(tmp_path / "own" / "one")
    assert set(first.state.took) == {"preparing"}
    other = Run(tmp_path / "own" / "two", begun.model_copy(update={"base_fingerprint": "f"}), True)
    assert last_took([first, other], other) == took
    again = Run(first.folder, first.state.model_copy(update={"stage": "preparing"}), True)
    assert last_took([again], again) is None, "itself, begun anew"
    assert last_took([first], Run(other.folder, begun.model_copy(update={"base_fingerprint": "g"}), True)) is None
    assert last_took([first], Run(other.folder, begun.model_copy(update={"stage": "training"}), True)) is None


def test_two_processes_never_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.runs.state.SECONDS_FOR_THE_LOCK", 0.0)
    with (
        keeping(tmp_path, state()),
        pytest.raises(RegistryError, match="another process"),
        keeping(tmp_path, state("second")),
    ):
        pass
    assert run_in(tmp_path).state.name == "own"


@pytest.mark.parametrize(
    ("error", "stage", "problem"),
    [
        (KeyboardInterrupt(), "stopped", None),
        (RunStoppedError("asked"), "stopped", None),
        (DataError("row 3 is empty"), "failed", "row 3 is empty"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
    ],
)
def test_how_a_run_ended_is_kept(tmp_path: Path, error: BaseException, stage: str, problem: str | None) -> None:
    with pytest.raises(type(error)), keeping(tmp_path, state()):
        raise error
    assert (run_in(tmp_path).stage, run_in(tmp_path).state.problem) == (stage, problem)


def test_going_on_keeps_when_it_began_and_how(tmp_path: Path) -> None:
    first = state(command=("train", "own"), created="2026-01-01T00:00:00+00:00")
    with keeping(tmp_path, first):
        pass
    with keeping(tmp_path, state()) as keeper:
        assert keeper.state.created == first.created and keeper.state.command == first.command


def test_a_damaged_state_is_said_and_does_not_hide_the_others(home: Path) -> None:
    for name in ("a", "b"):
        write_state(home / "runs" / name / "k1", state(name))
    (home / "runs" / "a" / "k1" / "run.json").write_text('{"name": 3}')
    with pytest.raises(DataError, match="does not hold the state"):
        read_state(home / "runs" / "a" / "k1")
    assert [run.name for run in list_runs(home)] == ["b/k1"]


def test_a_run_is_found_by_its_name_its_newest_or_the_beginning_of_its_key(home: Path) -> None:
    for key, moment in (("aa11", "2026-01-01"), ("ab22", "2026-01-02")):
        write_state(home / "runs" / "own" / key, state(created=f"{moment}T00:00:00+00:00"))
    assert find_run("own/aa11", home).folder.name == "aa11"
    assert find_run("own", home).folder.name == "ab22"
    assert find_run("ab", home).folder.name == "ab22"
    with pytest.raises(UnknownNameError, match="own/ab22"):
        find_run("other", home)
    note(home / "runs" / "own" / "aa11", reference="own:1")
    assert find_run("own/aa11", home).state.reference == "own:1"


def test_what_was_added_from_a_run_is_written_down_in_it_and_nowhere_else(tmp_path: Path) -> None:
    """From its adapter, a checkpoint or the run itself; not in a file of somebody else's, nor against a process at work."""
    for name in ("adapter", "checkpoint-5", "."):
        run = tmp_path / f"of-{name.strip('.')}"
        write_state(run, state())
        note_added(run / name, "own:2")
        assert run_in(run).state.reference == "own:2"
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "run.json").write_text('{"name": 3}')
    note_added(tmp_path / "strange" / "adapter", "own:3")
    assert (tmp_path / "strange" / "run.json").read_text() == '{"name": 3}'
    note_added(tmp_path / "nowhere" / "adapter", "own:3")
    assert not (tmp_path / "nowhere").exists()
    with keeping(tmp_path / "busy", state()):
        note_added(tmp_path / "busy" / "checkpoint-5", "own:3")
        assert run_in(tmp_path / "busy").state.reference is None


def test_curves_leave_out_what_was_done_twice_and_half_a_line(tmp_path: Path) -> None:
    write_state(tmp_path, state())
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.5},
        {"step": 2, "loss": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    run = run_in(tmp_path)
    assert run.curve() == [(1, 3.0), (2, 1.0)] and run.curve("eval_loss") == [(2, 2.5)]
    assert run.last("loss") == 1.0 and run.last("nothing") is None
