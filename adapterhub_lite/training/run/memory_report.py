"""Holds a prediction of memory to account: what a run was said to need beside what it needed. Knows no model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub_lite.errors import ResourceError
from adapterhub_lite.memory import record_peak
from adapterhub_lite.memory.estimate import GIB
from adapterhub_lite.training.run.measurement import PeakMemory
from adapterhub_lite.training.run.memory_choice import MemoryChoice

MEASURED_STEPS = 2


class MemoryReport(TrainerCallback):
    """By the end of the second step, says what was predicted and measured, and keeps both for the next prediction."""

    def __init__(
        self, choice: MemoryChoice, memory: PeakMemory, say: Callable[[str], object], home: str | Path | None = None
    ) -> None:
        self.choice, self.memory, self.say, self.home = choice, memory, say, home
        self.steps_seen = 0
        self.line: str | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare after the second step, when the optimizer's states are there."""
        self.steps_seen += 1
        if self.steps_seen == MEASURED_STEPS:
            self._compare(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare at the end of a run of fewer steps."""
        if 0 < self.steps_seen < MEASURED_STEPS:
            self._compare(state)

    def _compare(self, state: TrainerState) -> None:
        if not state.is_local_process_zero:
            return
        measured = self.memory.peak_bytes()
        self.line = describe(self.choice, measured)
        self.say(self.line)
        if self.choice.uncorrected is not None:
            try:
                record_peak(self.choice.uncorrected, measured, home=self.home)
            except ResourceError as error:
                # A memory aid: the run is none the worse for it.
                self.say(str(error))


def describe(choice: MemoryChoice, measured: int) -> str:
    """One line: the preset, predicted and measured GiB, and how far apart they are."""
    if choice.predicted is None:
        return f"memory: {choice.preset.name}, {measured / GIB:.2f} GiB measured, nothing was predicted"
    predicted = choice.predicted.total
    apart = predicted / measured - 1
    return (
        f"memory: {choice.preset.name}, {predicted / GIB:.2f} GiB predicted, {measured / GIB:.2f} GiB measured "
        f"({apart:+.1%})"
    )
