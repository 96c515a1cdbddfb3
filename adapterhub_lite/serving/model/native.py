"""This folder's C code, compiled for this processor; None where that cannot be done. Knows only pointers."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from adapterhub_lite.native import load_compiled

SOURCES = [Path(__file__).with_name(name) for name in ("row_products.c", "row_attention.c", "row_elementwise.c")]


@functools.cache
def compiled() -> ctypes.PyDLL | None:
    """Return the C code as a library, compiled at the first call in a process (about four seconds), or None."""
    library = load_compiled(SOURCES)
    if library is not None:
        pointer, size, number, real = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_float
        products, attention = library.add_row_products, library.attend_rows
        norm, turn, gate = library.add_and_norm, library.turn_and_store, library.gate
        products.argtypes = [pointer, pointer, number, number, pointer, size, pointer, size, *[number] * 5]
        attention.argtypes = [pointer, pointer, number, pointer, number, number]
        norm.argtypes = [*[pointer] * 5, real, real, real, *[number] * 4]
        turn.argtypes = [*[pointer] * 9, real, *[number] * 9]
        gate.argtypes = [pointer, pointer, real, real, *[number] * 4]
        for function in (products, attention, norm, turn, gate):
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
