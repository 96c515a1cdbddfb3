"""This folder's C code, compiled for this processor; None where that cannot be done. Knows only pointers."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from adapterhub_lite.native import load_compiled

SOURCES = [
    Path(__file__).with_name(f"{name}.c")
    for name in ("row_products", "row_attention", "prompt_attention", "products", "step")
]


@functools.cache
def compiled() -> ctypes.PyDLL | None:
    """Return the C code as a library, compiled at the first call in a process (about five seconds), or None."""
    library = load_compiled(SOURCES)
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        products, attention = library.add_row_products, library.attend_rows
        products.argtypes = [pointer, pointer, number, number, pointer, size, pointer, size, *[number] * 5]
        attention.argtypes = [pointer, pointer, number, pointer, number, number]
        for function in (products, attention):
            function.restype = None
    return library


def row_products() -> Callable[..., None] | None:
    """`add_row_products` of row_products.c, or None."""
    library = compiled()
    return library.add_row_products if library is not None else None


def row_attention() -> Callable[..., None] | None:
    """`attend_rows` of row_attention.c, or None."""
    library = compiled()
    return library.attend_rows if library is not None else None


class StepFunctions:
    """What step.c offers. The interpreter's lock is let go of while a step is computed: other threads go on."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        freeing = ctypes.CDLL(None, handle=library._handle)
        self.compute = freeing.compute_step
        self.scratch_bytes = library.step_scratch_bytes
        self.multiply = freeing.multiply
        self.multiply_scratch_bytes = library.multiply_scratch_bytes
        self.compute.argtypes = self.scratch_bytes.argtypes = [pointer]
        self.multiply.argtypes = [pointer, pointer, number, pointer, pointer, number]
        self.multiply_scratch_bytes.argtypes = [pointer, number]
        self.compute.restype = self.multiply.restype = None
        self.scratch_bytes.restype = self.multiply_scratch_bytes.restype = size
