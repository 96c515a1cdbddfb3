"""`run.json`, the state of a training run: what it was asked, how far it is, what came of it.

The process that trains holds `run.lock` as long as it lives, so a reader knows without asking the system whether a run
goes on, and two processes never train in one folder. Beside the two lie `metrics.jsonl` (one line per logged step),
`samples.jsonl` (answers at each evaluation), `report.json` (base beside adapter), checkpoints and the adapter itself.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import AdapterHubError, DataError, RegistryError, RunStoppedError
from adapterhub_lite.files import lock_file

STATE_FILE, LOCK_FILE, OUTPUT_FILE, REPORT_FILE = "run.json", "run.lock", "output.txt", "report.json"
# Held by a process that was started for a run, also while it waits for its turn.
PROCESS_LOCK_FILE = "process.lock"
# What lies in a run's folder before its first step.
KEPT_FILES = (STATE_FILE, LOCK_FILE, PROCESS_LOCK_FILE, OUTPUT_FILE)
Stage = Literal["waiting", "preparing", "training", "reporting", "finished", "stopped", "failed"]
# What a run does that is neither over nor stopped.
UNDER_WAY: frozenset[Stage] = frozenset({"waiting", "preparing", "training", "reporting"})
SECONDS_BETWEEN_WRITES = 0.3
SECONDS_FOR_THE_LOCK = 5.0
MOST_BYTES = 1 << 20


class RunState(StrictModel):
    """The state of one run. Times are UTC, in ISO 8601; memory is in bytes.

    `command` are the words behind `adapterhub-lite` that start the run or go on with it, in the folder `cwd`.
    `reference` is the version that became of it, `problem` why it failed. `since` is when its stage began, `took` the
    seconds of the stages that are over; of one that was gone through again, the last.
    """

    format: Literal[1] = 1
    name: str
    stage: Stage
    created: str
    changed: str
    since: str = ""
    took: dict[str, float] = Field(default_factory=dict)
    pid: int = 0
    command: tuple[str, ...] = ()
    cwd: str = ""
    base: str = ""
    base_fingerprint: str = ""
    data: str = ""
    data_fingerprint: str = ""
    rows: int = 0
    held_out: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)  # values of JSON
    preset: str | None = None
    predicted_bytes: int | None = None
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    problem: str | None = None
    reference: str | None = None


def now() -> str:
    """This moment, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def changed_state(state: RunState, changes: Mapping[str, Any]) -> RunState:
    """The state after `changes`, at this moment; with what a stage took that is over, unless it was broken off."""
    moment, stage = now(), changes.get("stage", state.stage)
    entered: dict[str, Any] = {}
    if stage != state.stage:
        entered["since"] = moment
        if stage not in ("stopped", "failed"):
            entered["took"] = {**state.took, state.stage: seconds_between(state.since or state.created, moment)}
    return state.model_copy(update={**entered, **changes, "changed": moment})


def seconds_between(begin: str, end: str) -> float:
    """Seconds from one time of `run.json` to another; 0 where they are none."""
    try:
        return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def write_state(folder: Path, state: RunState) -> None:
    """Write `run.json` whole: a reader finds the old state or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{STATE_FILE}.{os.getpid()}"
    beside.write_text(state.model_dump_json(indent=1), encoding="utf-8")
    beside.replace(folder / STATE_FILE)


def read_state(folder: Path) -> RunState | None:
    """The state of the run in `folder`; None where there is no `run.json`.

    Raises:
        DataError: it is damaged, or of a newer version of this project.
    """
    file = folder / STATE_FILE
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        return RunState.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{file} does not hold the state of a run ({error.error_count()} problems). Remove it, or update."
        ) from error


class RunKeeper:
    """Keeps the state of one run on disk, for the process that trains it."""

    def __init__(self, folder: Path, state: RunState) -> None:
        self.folder, self.state = folder, state
        self._written = 0.0

    def update(self, *, soon: bool = False, **changes: Any) -> None:
        """Change fields of the state; with `soon`, written only if the last writing is a moment ago."""
        self.state = changed_state(self.state, changes)
        if soon and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._written = time.monotonic()
        write_state(self.folder, self.state)


@contextmanager
def keeping(folder: Path, state: RunState) -> Iterator[RunKeeper]:
    """Hold the run in `folder` for this process and keep its state there; an error of the block becomes its `problem`.

    Raises:
        RegistryError: another process trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / LOCK_FILE, exclusive=True, seconds=SECONDS_FOR_THE_LOCK):
            before = read_state(folder)
            state = going_on(state, before) if before else state.model_copy(update={"since": state.created})
            keeper = RunKeeper(folder, state)
            keeper.update(pid=os.getpid())
            try:
                yield keeper
            except BaseException as error:
                keeper.update(**ending(error))
                raise
    except TimeoutError as error:
        other = read_state(folder)
        who = f" (process {other.pid})" if other else ""
        raise RegistryError(
            f"The run in {folder} is being trained by another process{who}. Wait for it; `adapterhub-lite runs` shows it."
        ) from error


def going_on(state: RunState, before: RunState) -> RunState:
    """The state of a run that was here before: begun then, started by the same words, its stages counted on."""
    since = before.since if before.stage == state.stage else now()
    carried = {
        "created": before.created,
        "command": state.command or before.command,
        "since": since,
        "took": before.took,
    }
    return state.model_copy(update=carried)


def ending(error: BaseException) -> dict[str, Any]:
    """The fields of a run that ended by `error`: stopped where somebody asked for it, else failed, and why."""
    if isinstance(error, KeyboardInterrupt | SystemExit | RunStoppedError):
        return {"stage": "stopped", "problem": None, "seconds_left": None}
    problem = str(error) if isinstance(error, AdapterHubError) else f"{type(error).__name__}: {error}"
    return {"stage": "failed", "problem": problem[:2000], "seconds_left": None}


def is_held(folder: Path) -> bool:
    """Whether a process trains in `folder` now, or waits to."""
    return any(_is_locked(folder / name) for name in (LOCK_FILE, PROCESS_LOCK_FILE))


def _is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        with lock_file(lock, exclusive=False, seconds=0.0):
            return False
    except TimeoutError:
        return True


def note(folder: Path, **changes: Any) -> None:
    """Change fields of the state of a run that nobody keeps at the moment, as the version that became of it."""
    state = read_state(folder)
    if state is not None:
        write_state(folder, changed_state(state, changes))


def note_added(adapter: Path, reference: str) -> None:
    """Write down what became of a run in whose folder `adapter` was added from: itself, its adapter or a checkpoint.

    Nothing is written where a process is at work, whose word counts, or where this one may not write.
    """
    for folder in (adapter, adapter.parent):
        with suppress(DataError, OSError):  # a file of somebody else's by the same name
            if not is_held(folder):
                note(folder, reference=reference)


def read_lines(file: Path, start: int = 0) -> list[dict[str, Any]]:
    """The JSON lines of a file from the byte `start`; a last line that is still being written is left out."""
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read()
    except FileNotFoundError:
        return []
    found = []
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # a run that was killed while writing
    return found
