"""What this machine's runs measured, and how it corrects the next prediction. One small JSON file under the home.

A run leaves (predicted components, measured peak). For the runs of one preset family on one kind of device, two numbers
are fitted: a factor on the activations, and bytes that are always there.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import ResourceError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.memory.estimate import MemoryEstimate

CALIBRATION_FILE = "memory_calibration.json"
MOST_RUNS_KEPT = 200
# A fit beyond these is no longer a correction: the estimate is wrong in another way, and is left as it is.
FACTOR_LIMITS = (0.4, 2.5)


class MeasuredRun(StrictModel):
    """One run: where and how it ran, what was predicted for it without any correction, and the peak it had, in bytes."""

    machine: str
    device: str
    preset: str
    activations: int
    others: int
    measured: int


class Calibration(StrictModel):
    """All runs kept on this machine, oldest first."""

    schema_version: int = 1
    runs: tuple[MeasuredRun, ...] = ()


def record_peak(predicted: MemoryEstimate, measured: int, *, home: str | Path | None = None) -> None:
    """Keep what a run measured (bytes), for `calibrated`; `predicted` is the estimate before any correction.

    Raises:
        ResourceError: the file cannot be written.
    """
    activations = predicted.components["activations"]
    run = MeasuredRun(
        machine=platform.node(),
        device=predicted.workload.device,
        preset=predicted.preset,
        activations=activations,
        others=predicted.total - activations,
        measured=measured,
    )
    kept = Calibration(runs=(*read_calibration(home).runs, run)[-MOST_RUNS_KEPT:])
    path = adapterhub_home(home) / CALIBRATION_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".new")
        aside.write_text(kept.model_dump_json(indent=1))
        aside.replace(path)
    except OSError as error:
        raise ResourceError(f"The memory calibration could not be written to {path}: {error.strerror}.") from error


def read_calibration(home: str | Path | None = None) -> Calibration:
    """The runs kept on this machine; a file that cannot be read counts as empty, because it is only a memory aid."""
    path = adapterhub_home(home) / CALIBRATION_FILE
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, json.JSONDecodeError):
        return Calibration()


def calibrated(predicted: MemoryEstimate, *, home: str | Path | None = None) -> MemoryEstimate:
    """`predicted` corrected by this machine's runs of the same preset; unchanged where there are none."""
    here = (platform.node(), predicted.workload.device, predicted.preset)
    runs = [r for r in read_calibration(home).runs if (r.machine, r.device, r.preset) == here]
    if not runs or predicted.unpredicted:
        return predicted
    factor, constant = fit(runs)
    components = dict(predicted.components)
    components["activations"] = round(components["activations"] * factor)
    components["overhead"] = max(0, round(components["overhead"] + constant))
    return replace(predicted, components=components)


def fit(runs: Sequence[MeasuredRun]) -> tuple[float, float]:
    """(factor on the activations, bytes to add), by least squares; where the activations do not differ, bytes alone."""
    activations = [float(r.activations) for r in runs]
    rest = [float(r.measured - r.others) for r in runs]
    mean_a, mean_r = sum(activations) / len(runs), sum(rest) / len(runs)
    spread = sum((a - mean_a) ** 2 for a in activations)
    if spread > (0.1 * mean_a) ** 2 * len(runs) and mean_a > 0:
        factor = sum((a - mean_a) * (r - mean_r) for a, r in zip(activations, rest, strict=True)) / spread
        if FACTOR_LIMITS[0] <= factor <= FACTOR_LIMITS[1]:
            return factor, mean_r - factor * mean_a
    return 1.0, mean_r - mean_a
