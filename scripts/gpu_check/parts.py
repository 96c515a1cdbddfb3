"""The parts in their order, each with its own limit in seconds; and the process that runs them.

    python -m scripts.gpu_check.parts SCRATCH NAME... [--dry] [--packages FOLDER]

writes a line of JSON per result to SCRATCH/NAME.jsonl as soon as it is there, and a last one when the part has ended, so
that a part that is ended by others keeps what it had. One process runs part after part, since to begin takes ten seconds.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

END = "part ended after seconds"
Result = tuple[str, dict[str, Any]]
# What must be right comes before how fast it is. On a GPU the limits add up to more than the eight minutes: what is
# left then is cut, and the last parts with it.
LIMITS = {
    "machine": 40,
    "loss_laws": 70,
    "step_laws": 60,
    "engine_laws": 75,
    "qlora_laws": 60,
    "resume_laws": 50,
    "loss_figures": 60,
    "memory_small": 80,
    "memory_large": 80,
    "step_figures": 70,
    "engine_figures": 90,
}


def results(name: str, scratch: Path, dry: bool) -> Iterator[Result]:
    """The results of a part, as they come."""
    from scripts.gpu_check import sizes as all_sizes

    sizes = all_sizes.TINY if dry else all_sizes.REAL
    if name == "machine":
        yield from machine()
    elif name in ("loss_laws",):
        from scripts.gpu_check.laws import loss_laws

        yield from loss_laws(sizes)
    elif name in ("step_laws", "qlora_laws", "resume_laws", "step_figures"):
        from scripts.gpu_check import training

        yield from getattr(training, name)(sizes, scratch)
    elif name in ("engine_laws", "engine_figures"):
        from scripts.gpu_check import serving

        yield from getattr(serving, name)(sizes, scratch)
    else:
        from scripts.gpu_check import figures

        if name == "loss_figures":
            yield from figures.loss_figures(sizes)
        elif name == "memory_small" or len(sizes.measured) > 1:
            yield from figures.memory_figures(sizes, scratch, sizes.measured[name == "memory_large"])


def machine() -> Iterator[Result]:
    """What is here: the devices, what they can do, the packages; and that the kernel's compiler works at all."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "free_and_total_bytes": list(torch.cuda.mem_get_info()),
        }
    for package in (
        "transformers",
        "peft",
        "accelerate",
        "triton",
        "bitsandbytes",
        "liger-kernel",
        "cut-cross-entropy",
    ):
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = None
    yield "found", found


def main() -> None:
    """Run parts and write their results; an error ends the process and is the part's last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("names", nargs="+", choices=list(LIMITS), metavar="NAME")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--packages", type=Path)
    arguments = parser.parse_args()
    if arguments.packages:
        # Before what the machine has itself: these are the versions that were tested together.
        sys.path.insert(0, str(arguments.packages))
    for name in arguments.names:
        began = time.monotonic()
        with (arguments.scratch / f"{name}.jsonl").open("a") as file:

            def write(found: dict[str, Any], file: TextIO = file) -> None:
                file.write(json.dumps(found, default=str) + "\n")
                file.flush()

            try:
                for case, found in results(name, arguments.scratch, arguments.dry):
                    write({"case": case, **found})
            except Exception as error:
                write({"case": "the part itself", "ok": False, "error": f"{type(error).__name__}: {str(error)[:2000]}"})
                raise
            write({END: round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
