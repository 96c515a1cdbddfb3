"""Starts a run as a process of its own, which outlives whoever started it, and asks it to stop. One run trains at a time."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from adapterhub_lite.errors import ResourceError, UsageError
from adapterhub_lite.files import claim, lock_file
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.runs.folder import Run, read_run
from adapterhub_lite.runs.state import (
    OUTPUT_FILE,
    PROCESS_LOCK_FILE,
    UNDER_WAY,
    RunState,
    ending,
    is_held,
    note,
    now,
    read_state,
    write_state,
)

TURN_FILE = "turn.lock"
# Tells a process that `start` started which run it is for.
FOLDER_VARIABLE = "ADAPTERHUB_RUN_FOLDER"
SECONDS_TO_END = 10.0


def start(folder: Path, state: RunState) -> None:
    """Start `adapterhub-lite` with the words `state.command` as a process of its own, for the run in `folder`.

    What it prints goes into `output.txt` there. It belongs to no terminal and to no server: only `stop` ends it early.

    Raises:
        UsageError: the command is not `train`.
        ResourceError: the process cannot be started.
    """
    if state.command[:1] != ("train",):
        raise UsageError("The run does not say how it was started, so it cannot be started again from here.")
    before = read_state(folder)
    created = before.created if before else state.created
    folder.mkdir(parents=True, exist_ok=True)
    moment = now()
    begun = {"stage": "waiting", "pid": 0, "created": created, "changed": moment, "since": moment, "took": {}}
    write_state(folder, state.model_copy(update=begun))
    try:
        with (folder / OUTPUT_FILE).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "adapterhub_lite", *state.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=state.cwd or None,
                start_new_session=True,
                env={**os.environ, FOLDER_VARIABLE: str(folder)},
            )
    except OSError as error:
        raise ResourceError(f"The training process could not be started: {error.strerror}.") from error
    # Somebody has to hear that it ended, or the system keeps its entry.
    threading.Thread(target=process.wait, name=f"run-{folder.name}", daemon=True).start()


def resume(run: Run) -> None:
    """Go on with a run that was stopped, or whose process is gone; raises as `start` does."""
    if run.is_under_way:
        raise UsageError(f"{run.name} is under way already.")
    start(run.folder, run.state)


def stop(run: Run) -> None:
    """Ask the process of a run to save and end: after the step it is in, as Ctrl-C in its terminal would.

    One that was started this moment is waited for, until it can hear.

    Raises:
        UsageError: nothing of it is under way.
    """
    while run.is_under_way and not run.state.pid:
        time.sleep(0.05)
        run = read_run(run.folder) or run
    if not run.is_under_way or not run.state.pid:
        raise UsageError(f"{run.name} is not under way, so there is nothing to stop.")
    try:
        # Not SIGINT: a process whose starter ignored it, as shells do in the background, would never hear it.
        os.kill(run.state.pid, signal.SIGTERM)
    except ProcessLookupError as error:
        raise UsageError(f"{run.name} has ended this moment, so there is nothing to stop.") from error
    if run.state.stage in ("waiting", "preparing"):
        # It has nothing to save and ends without a word.
        deadline = time.monotonic() + SECONDS_TO_END
        while is_held(run.folder) and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = read_state(run.folder)
        if not is_held(run.folder) and ended is not None and ended.stage in UNDER_WAY:
            note(run.folder, stage="stopped")


@contextmanager
def attended(home: str | Path | None, *, queue: bool) -> Iterator[None]:
    """A `with` block around all that a process does for a run: says that it lives, and why it ended before it trained.

    With `queue` it first waits for its turn; nothing heavy is in memory then. What `start` did not start says nothing.
    """
    # Taken out, because processes that this one starts are not the run's own.
    folder = os.environ.pop(FOLDER_VARIABLE, None)
    with ExitStack() as stack:
        if folder:
            lock = Path(folder) / PROCESS_LOCK_FILE
            stack.enter_context(lock_file(lock, exclusive=True, seconds=SECONDS_TO_END))
            note(Path(folder), pid=os.getpid())
        try:
            if queue:
                stack.enter_context(turn(home))
            if folder:
                note(Path(folder), stage="preparing")
            yield
        except BaseException as error:
            state = read_state(Path(folder)) if folder else None
            if folder and state is not None and state.stage in UNDER_WAY:
                note(Path(folder), **ending(error))
            raise


@contextmanager
def turn(home: str | Path | None = None) -> Iterator[None]:
    """Wait until no other run of this home that queues is at work, then hold the turn."""
    folder = adapterhub_home(home) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    release = claim((folder / TURN_FILE).open("a"), wait=True)
    try:
        yield
    finally:
        if release is not None:
            release()


def typed(words: Sequence[str]) -> str:
    """The command as people type it."""
    return shlex.join(["adapterhub-lite", *words])
