"""What a run shows while it goes and leaves behind: the progress bar, `metrics.jsonl` and `loss.png`."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from adapterhub_lite import devices
from adapterhub_lite.runs.folder import METRICS_FILE
from adapterhub_lite.runs.state import RunKeeper
from adapterhub_lite.training.run.measurement import RunMeter

logger = logging.getLogger(__name__)
PLOT_FILE = "loss.png"


class MetricsCallback(TrainerCallback, ExportableState):
    """Appends every logged line to `metrics.jsonl`, and lets checkpoints remember what the meter counted."""

    def __init__(self, meter: RunMeter) -> None:
        self.meter = meter

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback."""
        return {"args": {}, "attributes": self.meter.state()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from 0, or on from the checkpoint that the run goes on from."""
        # transformers declares a list, and keeps a dict by the callbacks' names.
        kept: Any = state.stateful_callbacks or {}
        remembered = kept.get(type(self).__name__, {}).get("attributes", {})
        self.meter.begin(**(remembered if state.global_step else {}))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line: the logged values with step, tokens, tokens per second and peak bytes."""
        if not state.is_world_process_zero or not args.output_dir:
            return
        line = {"step": state.global_step, **(logs or {}), "tokens": self.meter.tokens}
        line["tokens_per_second"] = round(self.meter.tokens_per_second, 1)
        line["peak_bytes"] = self.meter.peak_bytes
        with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=float) + "\n")


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """Plot training loss and each evaluation loss of `history` over the steps into `path` (PNG).

    Where matplotlib is not installed there is no picture: a trained adapter is not lost for want of it.
    """
    # What the steps have freed goes back first: matplotlib's own memory on top of it would be the peak of a small run.
    devices.trim_heap()
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so there is no %s; the figures are in %s.", path.name, METRICS_FILE
        )
        return

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = sorted({key for line in history for key in line if key == "loss" or key.endswith("_loss")} - {"train_loss"})
    for name in names:
        points = [(line["step"], line[name]) for line in history if name in line]
        axes.plot(*zip(*points, strict=True), label="training" if name == "loss" else name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token (nats)")
    if names:
        axes.legend()
    figure.savefig(path, dpi=110)


class StateCallback(TrainerCallback):
    """Keeps `run.json` up to date while the run trains: the step it is at, and how long the rest will take."""

    def __init__(self, keeper: RunKeeper) -> None:
        self.keeper = keeper
        self._began, self._first = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where it begins: at 0, or at the checkpoint it goes on from."""
        self._began, self._first = time.monotonic(), state.global_step
        self.keeper.update(stage="training", step=state.global_step, steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count one step."""
        seconds_a_step = (time.monotonic() - self._began) / max(1, state.global_step - self._first)
        left = seconds_a_step * (state.max_steps - state.global_step)
        self.keeper.update(soon=True, step=state.global_step, seconds_left=round(left, 1))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where it ended."""
        self.keeper.update(step=state.global_step, seconds_left=None)


class ProgressCallback(TrainerCallback):
    """A rich bar on the terminal: steps, loss, tokens per second, peak memory, time left.

    Where the output goes into a file, there is a line with the same figures now and then.
    """

    def __init__(self, meter: RunMeter, console: Console | None = None) -> None:
        self.meter = meter
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.seconds_between_lines, self._last_line = 10.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar on the first process of the run."""
        self._last_line = time.monotonic()
        if not state.is_local_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")

    def say(self, line: str) -> None:
        """Write a line above the bar."""
        self.console.print(line, highlight=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar by one step."""
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss, speed and memory."""
        if state.is_local_process_zero and logs and "loss" in logs:
            peak = self.meter.peak_bytes / (1 << 20)
            figures = f"loss {logs['loss']:.4f}  {self.meter.tokens_per_second:,.0f} tokens/s  {peak:,.0f} MiB"
            if self.bar:
                self.bar.update(self.task, figures=figures)
            elif not self.console.is_terminal and time.monotonic() - self._last_line >= self.seconds_between_lines:
                self._last_line = time.monotonic()
                self.say(f"training {state.global_step}/{state.max_steps}  {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, however the run ended."""
        if self.bar:
            self.bar.stop()
            self.bar = None
