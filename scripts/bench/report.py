"""What every measurement writes beside its figures: the machine, the versions, the command, the date. Runs no model."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "huggingface_hub", "numpy",
    "liger_kernel", "cut_cross_entropy", "triton",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """The machine as a reader needs it: processor and its matrix units, cores, memory in bytes, GPU if any."""
    described: dict[str, Any] = {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": None,
    }
    import torch

    described["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name(0)
        described["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return described


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of `packages`; those that are missing are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_result(name: str, payload: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write `payload` with machine, versions, command, commit and date to results/<name>.json; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + shlex.join(_inside_project(argument) for argument in sys.argv),
        "commit": _commit(),
        "machine": describe_machine(),
        "versions": versions(),
        **payload,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path


def _inside_project(argument: str) -> str:
    root = Path(__file__).resolve().parents[2]
    path = Path(argument)
    return str(path.resolve().relative_to(root)) if path.exists() and path.resolve().is_relative_to(root) else argument


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(units)})"


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
