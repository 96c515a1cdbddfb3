"""What a run's folder says, for everybody who looks at it: the command line, the app, and whoever starts it again."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import WEIGHTS_FILE
from adapterhub_lite.errors import DataError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.runs.state import REPORT_FILE, UNDER_WAY, RunState, is_held, read_lines, read_state

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
# A process that was just started has not taken its lock yet.
SECONDS_TO_START = 60.0


@dataclass(frozen=True)
class Run:
    """One run: its folder (`runs/NAME/KEY`), its state, and whether a process is at work in it."""

    folder: Path
    state: RunState
    is_alive: bool

    @property
    def name(self) -> str:
        """`NAME/KEY`, by which people name it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def stage(self) -> str:
        """The stage for people: `interrupted` where the process is gone without a word, as after a power cut."""
        return "interrupted" if self.state.stage in UNDER_WAY and not self.is_alive else self.state.stage

    @property
    def is_under_way(self) -> bool:
        """Whether something will still happen without anybody's doing."""
        return self.is_alive and self.state.stage in UNDER_WAY

    @property
    def can_resume(self) -> bool:
        """Whether the same command goes on with it."""
        return bool(self.state.command) and self.stage in ("interrupted", "stopped", "failed")

    @property
    def adapter(self) -> Path | None:
        """The finished adapter, or the last checkpoint as it is; None where nothing is saved."""
        if (self.folder / "adapter" / WEIGHTS_FILE).is_file():
            return self.folder / "adapter"
        saved = [path for path in self.folder.glob("checkpoint-*") if (path / WEIGHTS_FILE).is_file()]
        return max(saved, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines in the order of their steps; of a step that was done again after an interruption, the last."""
        kept: dict[tuple[int, bool], dict[str, Any]] = {}
        for line in read_lines(self.folder / METRICS_FILE):
            if isinstance(line.get("step"), int):
                kept[line["step"], "eval_loss" in line] = {**kept.get((line["step"], "eval_loss" in line), {}), **line}
        return [kept[key] for key in sorted(kept)]

    def curve(self, key: str = "loss") -> list[tuple[int, float]]:
        """(step, value) of one logged value: `loss`, `eval_loss`, `learning_rate`, ..."""
        return [(line["step"], float(line[key])) for line in self.metrics() if isinstance(line.get(key), int | float)]

    def samples(self) -> list[dict[str, Any]]:
        """The answers at each evaluation: step, prompt, wanted, found."""
        return read_lines(self.folder / SAMPLES_FILE)

    def report(self) -> dict[str, Any] | None:
        """Base beside adapter on the held-out rows, once the run has finished; None before that or without such rows."""
        try:
            found = json.loads((self.folder / REPORT_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def last(self, key: str) -> float | None:
        """The newest of one logged value."""
        return next((value for _, value in reversed(self.curve(key))), None)


def read_run(folder: Path) -> Run | None:
    """The run in `folder`; None where there is none.

    Raises:
        DataError: its `run.json` is damaged.
    """
    state = read_state(folder)
    if state is None:
        return None
    starting = state.stage == "waiting" and state.pid == 0 and seconds_since(state.changed) < SECONDS_TO_START
    return Run(folder, state, is_held(folder) or starting)


def list_runs(home: str | Path | None = None) -> list[Run]:
    """Every run of this home that can be read, the newest first."""
    found = []
    for file in adapterhub_home(home).glob("runs/*/*/run.json"):
        try:
            run = read_run(file.parent)
        except DataError:
            continue
        if run is not None:
            found.append(run)
    return sorted(found, key=lambda run: run.state.created, reverse=True)


def find_run(name: str, home: str | Path | None = None) -> Run:
    """The run that `NAME/KEY` names, or `NAME` its newest, or the beginning of a key.

    Raises:
        UnknownNameError: there is none, or several.
    """
    runs = list_runs(home)
    exact = [run for run in runs if run.name == name]
    newest = [run for run in runs if run.folder.parent.name == name][:1]
    begun = [run for run in runs if name and (run.folder.name.startswith(name) or run.name.startswith(name))]
    for found in (exact, newest, begun):
        if len(found) == 1:
            return found[0]
    raise UnknownNameError.among("run", name, [run.name for run in runs])


def last_took(runs: Sequence[Run], run: Run) -> float | None:
    """Seconds that the newest other of `runs` on the same base spent in the stage that `run` is in; None if none has."""
    for other in runs:
        same = other.state.base_fingerprint == run.state.base_fingerprint and other.folder != run.folder
        if same and run.state.stage in other.state.took:
            return other.state.took[run.state.stage]
    return None


def seconds_since(moment: str) -> float:
    """Seconds from a time of `run.json` until now."""
    try:
        return max(0.0, time.time() - datetime.fromisoformat(moment).astimezone(UTC).timestamp())
    except ValueError:
        return float("inf")
