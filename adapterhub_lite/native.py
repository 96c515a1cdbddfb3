"""Compiles C code for this processor and loads it; None where that cannot be done. Knows only files and a compiler."""

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
# The first set that the compiler takes; `native` is this very processor, which is where the result runs.
FLAGS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp-simd",),
)
# Four seconds of work; a machine that is very busy at the start still gets there.
COMPILE_SECONDS = 180


def find_compiler() -> str | None:
    """The C compiler on this machine: `$CC`, else cc, gcc or clang."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def load_compiled(sources: Sequence[Path], *flags: str) -> ctypes.PyDLL | None:
    """Compile `sources` with `flags` as well, and return them as a library, or None.

    None without a C compiler, or with ADAPTERHUB_NATIVE=0 in the environment. Takes some seconds: keep the result.
    """
    if os.environ.get("ADAPTERHUB_NATIVE") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        logger.info("No C compiler: PyTorch's own operations are used alone, which is slower on a CPU.")
        return None
    # Loaded from a folder of our own that is gone at once: nobody can put another library in its place.
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        made = Path(folder) / "compiled.so"
        try:
            # PyDLL keeps the interpreter's lock: a call is shorter than waiting to get the lock back.
            return ctypes.PyDLL(str(made)) if _compile(compiler, sources, flags, made) else None
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("The compiled code cannot be used (%s); PyTorch's is, which is slower.", error)
            return None


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], made: Path) -> bool:
    said = ""
    for ours in FLAGS:
        command = [compiler, "-O3", *ours, *flags, "-fPIC", "-shared", "-o", str(made), *map(str, sources), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode == 0:
            return True
        said = done.stderr.strip()
    logger.warning("%s does not compile our C code, PyTorch's slower way is used: %.300s", compiler, said)
    return False
