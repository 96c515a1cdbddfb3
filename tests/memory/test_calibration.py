"""What runs measured corrects the next prediction, for this machine and preset alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.memory import MemoryEstimate, Workload, calibrated, plan_memory, record_peak
from adapterhub_lite.memory.calibration import CALIBRATION_FILE, read_calibration
from adapterhub_lite.memory.estimate import COMPONENTS

MIB = 2**20


def predicted(activations: int, preset: str = "lora-bf16", device: str = "cpu") -> MemoryEstimate:
    components = dict.fromkeys(COMPONENTS, 0) | {
        "weights": 300 * MIB,
        "overhead": 700 * MIB,
        "activations": activations * MIB,
    }
    return MemoryEstimate(preset, Workload(1, 8, device=device), components)


def test_nothing_known_changes_nothing(home: Path) -> None:
    assert calibrated(predicted(500)) == predicted(500)


def test_one_run_is_a_constant(home: Path) -> None:
    record_peak(predicted(500), 1400 * MIB)
    assert calibrated(predicted(500)).total == 1400 * MIB
    assert calibrated(predicted(600)).total == 1500 * MIB


def test_several_runs_give_factor_and_constant(home: Path) -> None:
    for activations in (100, 400, 900):
        record_peak(predicted(activations), (1050 + round(activations * 0.8)) * MIB)
    assert calibrated(predicted(2000)).total == pytest.approx((1050 + 1600) * MIB, rel=1e-6)


def test_other_presets_devices_and_machines_are_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_peak(predicted(500), 1400 * MIB)
    assert calibrated(predicted(500, preset="lora-fp32")) == predicted(500, preset="lora-fp32")
    assert calibrated(predicted(500, device="cuda")) == predicted(500, device="cuda")
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert calibrated(predicted(500)) == predicted(500)


def test_a_broken_file_is_an_empty_one(home: Path) -> None:
    record_peak(predicted(500), 1400 * MIB)
    (home / CALIBRATION_FILE).write_text("{")
    assert read_calibration().runs == ()
    record_peak(predicted(500), 1400 * MIB)
    assert len(read_calibration().runs) == 1


def test_a_plan_is_corrected(home: Path, small_config: Any, machine: Any) -> None:
    def plan() -> Any:
        return plan_memory(small_config, batch_size=4, sequence_length=64, machine=machine(40))

    before = plan().predicted
    record_peak(before, before.total + 100 * MIB)
    assert plan().predicted.total == before.total + 100 * MIB
    assert replace(plan(), predicted=before).preset == plan().preset
