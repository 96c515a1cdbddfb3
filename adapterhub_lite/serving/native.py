"""Compiles `row_products.c` for this processor and loads it; None where that cannot be done. Knows only pointers."""

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("row_products.c")
# The first set that the compiler takes; `native` is this very processor, which is where the result runs.
FLAGS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp-simd",),
)
COMPILE_SECONDS = 60


@functools.cache
def row_products() -> Callable[..., None] | None:
    """Return `add_row_products` of the C file, compiled at the first call in a process (about a second), or None.

    None without a C compiler (`$CC`, cc, gcc or clang), or with ADAPTERHUB_NATIVE=0 in the environment.
    """
    if os.environ.get("ADAPTERHUB_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        logger.info("No C compiler: adapters are applied by PyTorch alone, which is slower on a CPU.")
        return None
    # Loaded from a folder of our own that is gone at once: nobody can put another library in its place.
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        made = Path(folder) / "row_products.so"
        try:
            if not _compile(compiler, made):
                return None
            # PyDLL keeps the interpreter's lock: a call is shorter than waiting to get the lock back.
            function = ctypes.PyDLL(str(made)).add_row_products
        except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
            logger.warning("The compiled row products cannot be used (%s); PyTorch's are, which are slower.", error)
            return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    function.argtypes = [pointer, pointer, number, number, pointer, size, pointer, size, *[number] * 5]
    function.restype = None
    found: Any = function
    return found


def _compile(compiler: str, made: Path) -> bool:
    said = ""
    for flags in FLAGS:
        command = [compiler, "-O3", *flags, "-fPIC", "-shared", "-o", str(made), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode == 0:
            return True
        said = done.stderr.strip()
    logger.warning("%s does not compile %s, PyTorch's slower products are used: %.300s", compiler, SOURCE.name, said)
    return False
