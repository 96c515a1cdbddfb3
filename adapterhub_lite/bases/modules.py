"""The modules of a base that hold a matrix, from the headers of its weight files alone. No torch."""

import re
from functools import lru_cache
from pathlib import Path

from adapterhub_lite.adapter_format.binding import Modules
from adapterhub_lite.adapter_format.safetensors_header import MAX_BASE_HEADER_BYTES, read_tensor_entries


def base_modules(folder: Path) -> Modules:
    """The modules of the base in `folder` that hold a matrix: dotted name -> shape of its weight.

    A head that shares the embedding's weight is listed as `lm_head` though no file holds it.
    """
    files = sorted(folder.glob("*.safetensors"))
    stats = [(path, path.stat()) for path in files]
    return _base_modules(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats))


@lru_cache(maxsize=8)
def _base_modules(stamp: tuple[tuple[Path, int, int, int], ...]) -> Modules:
    found: dict[str, tuple[int, ...]] = {}
    for path, *_ in stamp:
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES):
            if entry.name.endswith(".weight") and len(entry.shape) == 2:
                found[entry.name.removesuffix(".weight")] = entry.shape
    embedding = next((shape for name, shape in found.items() if re.search(r"(^|\.)(embed_tokens|wte)$", name)), None)
    if embedding and not any(name.endswith("lm_head") for name in found):
        found["lm_head"] = embedding
    return found


def stored_modules(folder: Path) -> frozenset[str]:
    """The modules of the base in `folder` whose weight is in a file of its own: a tied head is not among them."""
    return frozenset(
        entry.name.removesuffix(".weight")
        for path in folder.glob("*.safetensors")
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    )
