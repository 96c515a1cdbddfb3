"""What every measurement records with its figures: the machine, the versions, the command, the date. Runs no model."""

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
    """Describe the machine for a reader: processor and its matrix units, cores, memory in bytes, GPU if any."""
    described: dict[str, Any] = {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
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
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    whole = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + shlex.join(inside_project(argument) for argument in sys.argv),
        "commit": done.stdout.strip() or None,
        "machine": describe_machine(),
        "versions": versions(),
        **payload,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    return path


def inside_project(argument: str) -> str:
    """An argument as it is typed in the project's root: paths inside are made relative, of others the name is left."""
    root = Path(__file__).resolve().parents[2]
    path = Path(argument)
    if path.exists() and path.resolve().is_relative_to(root):
        return str(path.resolve().relative_to(root))
    return path.name if path.is_absolute() else argument


def processor() -> str:
    """The name of the processor and its vector and matrix units."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(units)})"
