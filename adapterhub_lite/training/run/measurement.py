"""The peak memory of this process or its GPU while a run lasts. Knows no model."""

import contextlib
import gc
import platform
import resource
import sys
from pathlib import Path

import torch

from adapterhub_lite.memory.heap import trim_heap


class PeakMemory:
    """Measures the peak from its construction on: allocated bytes on a GPU, resident bytes of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    @staticmethod
    def before(device: torch.device, model: object) -> int:
        """Bytes that count towards the peak and are no part of a run on `model`: on a CPU, the process as it is now."""
        if device.type == "cuda":
            return 0
        # An earlier run, or the conversion of a base, leaves several hundred MB that are free and will be used again.
        gc.collect()
        trim_heap()
        footprint = getattr(model, "get_memory_footprint", lambda: 0)
        return max(0, resident_bytes() - int(footprint()))

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux forgets the old peak on this write; elsewhere the peak since the process began is what there is.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The peak so far, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            return int(found[0]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """What this process has resident now, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0


def describe_hardware(device: torch.device) -> dict[str, str | int | float]:
    """Say what the run ran on: the device's name, its count, threads, system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return {
        "device": device.type,
        "device_name": name,
        "device_count": count,
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
