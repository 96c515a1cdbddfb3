"""Memory that really runs out: the system refuses a process more address space in the middle of a run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to RLIMIT_AS")

# Between what half the rows need (less than 100 MB) and what all of them do (300 MB).
SPARE = 190_000_000


def run(base: Path, output: Path, spare: int, when: str) -> dict[str, Any]:
    script = Path(__file__).parent / "limited_memory.py"
    command = [sys.executable, "-W", "ignore", str(script), str(base), str(output), str(spare), when]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_a_run_goes_on_with_what_fits_and_learns_the_same(tiny_base: Path, tmp_path: Path) -> None:
    plenty = run(tiny_base, tmp_path / "plenty", 0, "replan")
    tight = run(tiny_base, tmp_path / "tight", SPARE, "replan")
    assert plenty["error"] is None and plenty["rows"] == 128
    assert tight["error"] is None and tight["rows"] < 128 and tight["rows"] * tight["times"] == 128
    assert "memory ran out" in tight["reasons"][-1]
    assert tight["losses"] == pytest.approx(plenty["losses"], rel=1e-5)


def test_a_run_that_may_not_replan_says_what_would_fit(tiny_base: Path, tmp_path: Path) -> None:
    found = run(tiny_base, tmp_path / "run", SPARE, "stop")
    assert "does not fit on cpu" in found["error"] and "rows would" in found["error"]
