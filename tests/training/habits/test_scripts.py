"""The scripts of the page on moving here, run as they stand and as they were before: the losses are the same."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ROOT

PAGE = ROOT / "docs" / "how-to" / "from-trl-or-peft.md"
PORTED = re.compile(r"^from adapterhub_lite import .*# was: (?P<before>.*)$", re.MULTILINE)
SCRIPTS = [code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if PORTED.search(code)]


def run(code: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder.mkdir()
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(code, name, "exec"), names)
    return names["trainer"]


def test_there_are_three() -> None:
    assert len(SCRIPTS) == 3


# TRL sets what transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_both_forms_have_the_same_losses(
    number: int, home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base, home / "bases" / "smollm2-135m")
    code = SCRIPTS[number]
    before = PORTED.sub(lambda found: found["before"], code)
    if "from trl" in before:
        pytest.importorskip("trl")
    assert before != code
    ours = run(code, f"script {number}", tmp_path / "here", monkeypatch)
    theirs = run(before, f"script {number} before", tmp_path / "there", monkeypatch)
    for key in ("loss", "eval_loss", "eval_accuracy", "learning_rate"):
        found, wanted = ([line[key] for line in one.state.log_history if key in line] for one in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-3), key
