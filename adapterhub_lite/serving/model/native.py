"""Compiles this folder's C code for this processor and loads it; None where that cannot be done. Knows only pointers."""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)
SOURCES = [Path(__file__).with_name(name) for name in ("row_products.c", "row_attention.c")]
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


@functools.cache
def compiled() -> ctypes.PyDLL | None:
    """Return the C code as a library, compiled at the first call in a process (about four seconds), or None.

    None without a C compiler, or with ADAPTERHUB_NATIVE=0 in the environment.
    """
    if os.environ.get("ADAPTERHUB_NATIVE") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        logger.info("No C compiler: adapters are applied by PyTorch alone, which is slower on a CPU.")
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    # Loaded from a folder of our own that is gone at once: nobody can put another library in its place.
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        made = Path(folder) / "rows.so"
        try:
            if not _compile(compiler, made):
                return None
            # PyDLL keeps the interpreter's lock: a call is shorter than waiting to get the lock back.
            library = ctypes.PyDLL(str(made))
            products, attention = library.add_row_products, library.attend_rows
        except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
            logger.warning("The compiled code cannot be used (%s); PyTorch's is, which is slower.", error)
            return None
    products.argtypes = [pointer, pointer, number, number, pointer, size, pointer, size, *[number] * 5]
    attention.argtypes = [pointer, pointer, number, pointer, number, number]
    products.restype = attention.restype = None
    return library


def row_products() -> Callable[..., None] | None:
    """`add_row_products` of row_products.c, or None."""
    library = compiled()
    return library.add_row_products if library is not None else None


def row_attention() -> Callable[..., None] | None:
    """`attend_rows` of row_attention.c, or None."""
    library = compiled()
    return library.attend_rows if library is not None else None


def _compile(compiler: str, made: Path) -> bool:
    said = ""
    for flags in FLAGS:
        command = [compiler, "-O3", *flags, "-fPIC", "-shared", "-o", str(made), *map(str, SOURCES), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode == 0:
            return True
        said = done.stderr.strip()
    logger.warning("%s does not compile our C code, PyTorch's slower way is used: %.300s", compiler, said)
    return False
