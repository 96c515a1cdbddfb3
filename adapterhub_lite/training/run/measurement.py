"""What a run needs and does, measured while it lasts: peak memory beside the prediction, tokens, seconds. Knows no model."""

import contextlib
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapterhub_lite import devices
from adapterhub_lite.errors import ResourceError
from adapterhub_lite.memory import record_peak
from adapterhub_lite.memory.estimate import GIB
from adapterhub_lite.training.run.memory_choice import MemoryChoice


class PeakMemory:
    """Measures the peak from its construction on: allocated bytes on a device that counts them, else resident bytes of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    @staticmethod
    def before(device: torch.device, model: object) -> int:
        """Bytes that count towards the peak and are no part of a run on `model`: on a CPU, the process as it is now."""
        if devices.counts_peak(device):
            return 0
        # An earlier run, or the conversion of a base, leaves several hundred MB that are free and will be used again.
        gc.collect()
        devices.trim_heap()
        footprint = getattr(model, "get_memory_footprint", lambda: 0)
        return max(0, resident_bytes() - int(footprint()))

    def reset(self) -> None:
        """Forget the peak so far."""
        if devices.counts_peak(self.device):
            devices.reset_peak(self.device)
        else:
            # Linux forgets the old peak on this write; elsewhere the peak since the process began is what there is.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The peak so far, in bytes."""
        counted = devices.peak_bytes(self.device)
        if counted is not None:
            return counted
        status = Path("/proc/self/status")
        if status.exists():
            found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            return int(found[0]) * 1024
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """What this process has resident now, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def describe_hardware(device: torch.device) -> dict[str, str | int | float]:
    """Say what the run ran on: the device's name, its count, threads, system."""
    name = devices.name_of(device) or processor_name()
    count = devices.count() if devices.is_accelerator(device) else 1
    return {
        "device": device.type,
        "device_name": name,
        "device_count": count,
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def processor_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


MEASURED_STEPS = 2


@dataclass
class RunMeter:
    """Counts what a run has done so far: real tokens (padding left out), seconds, peak bytes.

    A resumed run counts on from its checkpoint.
    """

    memory: PeakMemory
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    peak_before: int = 0

    def begin(self, tokens: int = 0, seconds: float = 0.0, peak_bytes: int = 0) -> None:
        """Start at 0, or at what a checkpoint remembers."""
        self.tokens, self.started, self.peak_before = tokens, time.perf_counter() - seconds, peak_bytes

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers, for `begin`."""
        return {"tokens": self.tokens, "seconds": self.seconds, "peak_bytes": self.peak_bytes}

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Count the real tokens of a batch."""
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    @property
    def peak_bytes(self) -> int:
        """The highest peak of the run, the processes before this one included."""
        return max(self.peak_before, self.memory.peak_bytes())

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Real tokens trained on a second, over the whole run."""
        return self.tokens / max(self.seconds, 1e-9)


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
