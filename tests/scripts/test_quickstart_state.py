"""The quickstart's memory: finished stages are reused, other settings are not, a torn file costs nothing but work."""

from pathlib import Path
from typing import Any

import pytest

from scripts.quickstart.state import QuickstartState


def counting(result: dict[str, Any], calls: list[int]) -> Any:
    def work() -> dict[str, Any]:
        calls.append(1)
        return result

    return work


def test_a_finished_stage_is_reused_and_says_so(tmp_path: Path) -> None:
    state, calls, said = QuickstartState(tmp_path / "state.json", {"seed": 0}), [], []
    first = state.run("train", counting({"steps": 3}, calls), said.append)
    again = QuickstartState(tmp_path / "state.json", {"seed": 0}).run("train", counting({}, calls), said.append)
    assert first == again == {"steps": 3}
    assert len(calls) == 1
    assert "reused" in said[-1]


def test_other_settings_or_starting_over_do_the_work_again(tmp_path: Path) -> None:
    calls: list[int] = []
    for seed in (0, 1):
        QuickstartState(tmp_path / "state.json", {"seed": seed}).run("train", counting({}, calls), print)
    state = QuickstartState(tmp_path / "state.json", {"seed": 1})
    state.forget()
    state.run("train", counting({}, calls), print)
    assert len(calls) == 3


def test_a_torn_file_only_costs_the_work(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"settings": "x", "sta')
    calls: list[int] = []
    QuickstartState(tmp_path / "state.json", {}).run("train", counting({}, calls), print)
    assert len(calls) == 1


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    state = QuickstartState(tmp_path / "state.json", {})

    def fail() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        state.run("train", fail, print)
    assert not (tmp_path / "state.json").exists()
