"""Formats whose readers are not built for strangers' files, read in a child process with limits: pickles and GGUF.

The child may use so much memory and time and write so many bytes, and no more; it has no door back but the file that it
writes, which is then examined like any other.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from adapterhub_lite.errors import AdapterRejectedError

CPU_SECONDS = 120
WALL_SECONDS = 300
# Of address space, of which importing torch alone takes some gigabytes.
MEMORY_BYTES = 12 << 30
MAX_OUTPUT_BYTES = 4 << 30
MODULE = "adapterhub_lite.adapter_format.foreign.child"


def convert_in_child(subject: str, kind: str, source: Path, target: Path, *more: str) -> str:
    """Convert `source` to the safetensors file `target` in a child process; returns what it said.

    Raises:
        AdapterRejectedError: it could not, or ran into a limit.
    """
    command = [sys.executable, "-P", "-m", MODULE, kind, str(source), str(target), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise AdapterRejectedError(subject, [f"converting it takes more than {WALL_SECONDS} seconds"]) from None
    last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    if done.returncode or not target.is_file():
        target.unlink(missing_ok=True)
        raise AdapterRejectedError(subject, [f"{source.name:.80} could not be converted: {last:.300}"])
    return done.stdout.strip()


def _limit() -> None:
    """Give this process its bounds, before it has read a byte or imported what reads."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def from_pickle(source: Path, target: Path) -> str:
    """Write the tensors of a pickled state dict as safetensors; nothing in it is executed (`weights_only`)."""
    import torch
    from safetensors.torch import save_file

    found = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not the tensors of an adapter")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    others = sorted(str(name) for name in found if not isinstance(found[name], torch.Tensor))
    if others or not tensors:
        raise ValueError(f"not everything in it is a tensor ({', '.join(others[:3]) or 'it is empty'})")
    # Each its own bytes: what a pickle shares between tensors, safetensors does not.
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, target, metadata={"format": "pt"})
    return f"converted from {source.name}, a pickle, by a reader that executes nothing"


def main(arguments: list[str]) -> int:
    """Convert as the command line says: kind, source, target and what that kind needs more."""
    _limit()
    from adapterhub_lite.adapter_format.foreign.gguf_lora import from_gguf

    kinds: dict[str, Callable[..., str]] = {"pickle": from_pickle, "gguf": from_gguf}
    try:
        print(kinds[arguments[0]](*map(Path, arguments[1:])))
    except Exception as error:  # whatever a reader stumbles over is a sentence for the parent
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
