"""`scripts/gpu_check.sh`: every part runs on a CPU with tiny sizes; a part that is ended keeps what it found; the wheels are few."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check.parts import END, LIMITS
from scripts.gpu_check.wheels import PACKAGES, normalised, pins, strip
from tests.checkout import ROOT


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_finds_nothing_wrong(tmp_path: Path) -> None:
    command = ["bash", "scripts/gpu_check.sh", "--dry", "--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    whole = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert done.returncode == 0, done.stdout + json.dumps(whole, indent=1)[-4000:]
    assert list(whole["parts"]) == list(LIMITS) and whole["dry"]
    assert {part["ended"] for part in whole["parts"].values()} == {"finished"}
    right = {name: sum(one.get("ok") is True for one in part["results"]) for name, part in whole["parts"].items()}
    # Two implementations in three dtypes for four options; a step of two dtypes packed and padded; three presets at least.
    assert right["loss_laws"] == 24 and right["step_laws"] == 4 and right["qlora_laws"] >= 3
    assert right["engine_laws"] == 2 and right["resume_laws"] == 1  # the engine with recorded steps and without
    failed = [one for part in whole["parts"].values() for one in part["results"] if "failed" in one]
    assert failed == []


class Stuck(gpu_check.Worker):
    """A worker whose process never says anything."""

    started = 0

    def _start(self, names: list[str]) -> None:
        self.started += 1
        self.log.write_text("the last words")
        self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)


def test_what_a_part_found_before_its_limit_is_kept_and_the_next_begins_anew(tmp_path: Path) -> None:
    worker = Stuck(tmp_path, True, None)
    (tmp_path / "machine.jsonl").write_text('{"case": "one", "ok": true}\n{"case": "cut off')
    found = worker.run(["machine", "loss_laws"], 0.2)
    assert found["results"] == [{"case": "one", "ok": True}]
    assert found["ended"].startswith("ended at its limit") and found["log"] == "the last words"
    assert worker.child is None
    (tmp_path / "loss_laws.jsonl").write_text(json.dumps({"case": "two"}) + "\n" + json.dumps({END: 3.5}) + "\n")
    assert worker.run(["loss_laws"], 60) == {"ended": "finished", "seconds": 3.5, "results": [{"case": "two"}]}
    assert worker.started == 2
    worker.stop()


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([{"ended": "finished", "results": [{"ok": True}, {"seconds": 1}]}], 0),
        ([{"ended": "ended at its limit of 3 s", "results": [{"ok": True}]}], 3),
        ([{"ended": "failed with exit code 1", "results": []}], 1),
        ([{"ended": "finished", "results": [{"ok": False}]}, {"ended": "ended at its limit of 3 s", "results": []}], 1),
    ],
)
def test_the_exit_code_tells_wrong_from_unfinished(parts: list[dict[str, Any]], code: int) -> None:
    assert gpu_check.verdict({str(index): part for index, part in enumerate(parts)}) == code


def test_bitsandbytes_is_carried_for_one_cuda_version(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    files = [
        "bitsandbytes/__init__.py",
        *(f"bitsandbytes/libbitsandbytes_{one}.so" for one in ("cpu", "cuda128", "cuda130")),
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in files:
            archive.writestr(name, name)
    with pytest.raises(SystemExit, match="no library for cuda999, only cpu, cuda128, cuda130"):
        strip(wheel, {"cpu", "cuda999"})
    strip(wheel, {"cpu", "cuda130"})
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [name for name in files if "128" not in name]
        assert archive.read(files[1]).decode() == files[1]
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    with pytest.raises(SystemExit, match="holds packages for cp27"):
        (tmp_path / "x-1-cp27-cp27-linux.whl").write_bytes(b"")
        gpu_check.unpacked(tmp_path, tmp_path / "packages")


def test_what_is_carried_is_what_was_tested() -> None:
    """Every package in the version of constraints.txt, but for one that no extra of ours brings."""
    pinned = pins(ROOT / "constraints.txt")
    assert [name for name in PACKAGES if normalised(name) not in pinned] == ["cut-cross-entropy"]
