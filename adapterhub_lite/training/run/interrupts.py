"""Ctrl-C and SIGTERM to a run: what they ask for, and what is saved when it has ended. Knows signals and folders alone.

Once, either lets what is running end and has it saved. Ctrl-C a second time ends at once: what was saved before stays, for
a checkpoint is whole or not there.
"""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from transformers.trainer_utils import get_last_checkpoint

from adapterhub_lite.training.distributed.launch import announce

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """The last checkpoint of a run: its folder, and how many of the wanted steps it holds."""

    folder: Path
    steps: int
    wanted: int

    def __str__(self) -> str:
        done = f"All {self.wanted} steps are" if self.steps >= self.wanted else f"Step {self.steps} of {self.wanted} is"
        return f"{done} saved in {self.folder}."


def last_saved(run: Path) -> Saved | None:
    """The last whole checkpoint in the run folder `run`, None where there is none."""
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if last is None:
        return None
    state = json.loads((Path(last) / "trainer_state.json").read_bytes())
    return Saved(Path(last), int(state["global_step"]), int(state["max_steps"]))


class StopRequest:
    """Whether this process was asked to stop its run, and by which signal; `doing` is what would still be finished."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        self.doing = "the first step"

    @contextmanager
    def listening(self, run: Path) -> Iterator[None]:
        """While inside, SIGTERM and a first Ctrl-C only ask.

        A program that handles Ctrl-C in its own way, or ignores it, keeps doing so.

        Raises:
            KeyboardInterrupt: at once by a second Ctrl-C; after one, when the run in folder `run` has stopped.
        """
        self.asked = self.interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        saved = last_saved(run) if self.asked else None
        if self.asked and not self.interrupted:
            logger.warning(
                "The run was asked to stop by SIGTERM and returns now. %s", saved or "Nothing of it is saved."
            )
        if self.interrupted:
            raise KeyboardInterrupt(f"{saved} train(resume_from_checkpoint=True) goes on from there." if saved else "")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt
            self.interrupted = True
            announce(self.doing)
        self.asked = True
