"""The whole journey: on a tiny base in seconds, on the real one in minutes; killed anywhere, the next run goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.registry import AdapterRegistry
from scripts.quickstart.run import run_quickstart
from scripts.quickstart.stages import QuickstartSettings
from tests.checkout import ROOT


def check_report(report: dict[str, Any]) -> None:
    assert set(report["tasks"]) == {"sql", "event"}
    for row in report["tasks"].values():
        assert set(row) == {"base_exact_match", "adapter_exact_match", "train_seconds", "peak_bytes", "steps"}
        assert row["peak_bytes"] > 0
    assert report["hub_round_trip"] == "identical"
    assert report["mixed_batch_equals_solo"] is True
    assert 0 < report["switch_ms_median"] <= report["switch_ms_p99"]


def start(home: Path, base: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "scripts.quickstart", "--headless", "--base", str(base), "--held-out", "4"]
    return subprocess.Popen(
        [*command, "--sql-steps", "3", "--event-steps", "2"],
        cwd=ROOT,
        env={**os.environ, "ADAPTERHUB_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_journey_on_a_tiny_base_and_a_second_run_that_reuses_it(tiny_base: Path, tmp_path: Path) -> None:
    settings = QuickstartSettings(base=str(tiny_base), steps=(("sql", 3), ("event", 2)), held_out=4)
    first = run_quickstart(tmp_path, settings)
    check_report(first)
    registry = AdapterRegistry(tmp_path)
    assert registry.resolve("sql@prod").training is not None
    second = run_quickstart(tmp_path, settings)
    assert second["tasks"] == first["tasks"]
    assert [manifest.version for manifest in registry.list(name="sql")] == [1]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_its_last_line_is_the_report(tiny_base: Path, tmp_path: Path) -> None:
    for line_to_die_at in ("train event", "share", "serve"):
        killed = start(tmp_path, tiny_base)
        assert killed.stderr is not None
        for line in killed.stderr:
            if line_to_die_at in line:
                break
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    done = start(tmp_path, tiny_base)
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    check_report(json.loads(output.splitlines()[-1]))
    assert "reused" in errors


@pytest.mark.slow
def test_the_journey_on_the_real_base(real_base: Path, tmp_path: Path) -> None:
    settings = QuickstartSettings(base=str(real_base), steps=(("sql", 25), ("event", 2)), held_out=10)
    report = run_quickstart(tmp_path, settings)
    check_report(report)
    sql = report["tasks"]["sql"]
    assert sql["base_exact_match"] <= 0.1
    # Two dozen steps are enough to see it learn; how well it can learn is the quickstart's own figure.
    assert sql["adapter_exact_match"] >= 0.5
