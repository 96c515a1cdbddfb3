"""What a run shows while it goes and leaves behind: the progress bar, `metrics.jsonl` and `loss.png`."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from adapterhub_lite.training.run.measurement import RunMeter

METRICS_FILE = "metrics.jsonl"
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
    """Plot training loss and each evaluation loss of `history` over the steps into `path` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


class ProgressCallback(TrainerCallback):
    """A rich bar on the terminal: steps, loss, tokens per second, peak memory, time left.

    Where the output goes into a file, there is a line with the same figures now and then.
    """

    def __init__(self, meter: RunMeter, console: Console | None = None) -> None:
        self.meter = meter
        self.console = console or Console(stderr=True)
        self.bar: Progress | None = None
        self.seconds_between_lines, self._last_line = 20.0, 0.0

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
