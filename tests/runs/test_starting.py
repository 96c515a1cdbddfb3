"""Runs as processes of their own: they wait for their turn, say that they live, and hear that they should stop."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from adapterhub_lite.errors import UsageError
from adapterhub_lite.runs.folder import Run, read_run
from adapterhub_lite.runs.starting import FOLDER_VARIABLE, attended, resume, start, stop, turn, typed
from adapterhub_lite.runs.state import RunState, now, write_state

PATIENCE = 60.0


def state(**more: object) -> RunState:
    return RunState(**{"name": "own", "stage": "waiting", "created": now(), "changed": now(), **more})  # type: ignore[arg-type]


def attend(home: str, folder: str, leave: object) -> None:
    os.environ[FOLDER_VARIABLE] = folder
    with attended(home, queue=True):
        assert FOLDER_VARIABLE not in os.environ
        leave.wait()  # type: ignore[attr-defined]


@pytest.fixture
def wait_in(home: Path) -> Callable[[Path], tuple[BaseProcess, object]]:
    """A function that starts a process which attends to the run in a folder, as one that `start` started does."""
    context = multiprocessing.get_context("spawn")

    def started(folder: Path) -> tuple[BaseProcess, object]:
        leave = context.Event()
        process = context.Process(target=attend, args=(str(home), str(folder), leave), daemon=True)
        process.start()
        return process, leave

    return started


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def run_in(folder: Path) -> Run:
    found = read_run(folder)
    assert found is not None
    return found


def test_a_run_waits_while_another_has_the_turn_and_can_be_called_off(
    home: Path, wait_in: Callable[[Path], tuple[BaseProcess, object]]
) -> None:
    first, second = home / "runs" / "own" / "a", home / "runs" / "own" / "b"
    for folder in (first, second):
        write_state(folder, state())
    one, leave = wait_in(first)
    until(lambda: run_in(first).stage == "preparing")
    other, _ = wait_in(second)
    until(lambda: run_in(second).state.pid == other.pid)
    assert run_in(second).stage == "waiting" and run_in(second).is_under_way
    stop(run_in(second))
    other.join(PATIENCE)
    assert run_in(second).stage == "stopped" and run_in(first).is_under_way
    leave.set()  # type: ignore[attr-defined]
    one.join(PATIENCE)
    with turn(home):  # it is free again
        pass
    assert run_in(first).stage == "interrupted"
    with pytest.raises(UsageError, match="nothing to stop"):
        stop(run_in(first))


def test_a_run_that_was_started_this_moment_is_stopped_all_the_same(home: Path) -> None:
    """The real command: somebody presses Resume, and then Stop while its interpreter has not even started."""
    folder = home / "runs" / "own" / "a"
    with turn(home):  # so that it cannot end by itself
        start(folder, state(command=("train", "own", "--data", "x.csv", "--home", str(home), "--queue"), cwd=str(home)))
        assert run_in(folder).state.pid == 0
        stop(run_in(folder))
        assert run_in(folder).stage == "stopped" and not run_in(folder).is_under_way


def test_an_error_before_the_first_step_is_the_problem_of_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "runs" / "own" / "a"
    write_state(folder, state())
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    with pytest.raises(UsageError), attended(home, queue=False):
        raise UsageError("There is no such file.")
    assert (run_in(folder).stage, run_in(folder).state.problem) == ("failed", "There is no such file.")


def test_only_training_is_ever_started(home: Path) -> None:
    folder = home / "runs" / "own" / "a"
    for command in ((), ("remove", "sql:1")):
        with pytest.raises(UsageError, match="cannot be started"):
            start(folder, state(command=command))
    assert read_run(folder) is None
    assert typed(("train", "a b")) == "adapterhub-lite train 'a b'"


def test_a_run_that_cannot_start_says_why_in_its_folder(home: Path) -> None:
    """The real command, whose data is not there."""
    folder = home / "runs" / "own" / "a"
    command = ("train", "own", "--data", "nowhere.csv", "--home", str(home), "--queue", "--no-add")
    start(folder, state(command=command, cwd=str(home)))
    assert run_in(folder).is_under_way
    with pytest.raises(UsageError, match="under way already"):
        resume(run_in(folder))
    until(lambda: run_in(folder).stage == "failed")
    assert "nowhere.csv" in str(run_in(folder).state.problem)
    until(lambda: "nowhere.csv" in (folder / "output.txt").read_text())  # said after it is noted
