"""Files from strangers, read strictly and within a budget: JSON objects, and safetensors files as bytes. No torch.

JSON is bounded, without duplicate keys or NaN. Of a safetensors file the header is read, and whether its values are
finite. The reference reader accepts 700,000 empty tensors or a 90 MB metadata string; a stranger's file is read here first.
Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen value object read from JSON: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def strict_json(content: bytes, *, what: str, limit: int) -> dict[str, Any]:
    """Parse a JSON object of at most `limit` bytes.

    Raises:
        ValueError: too long, not UTF-8, not JSON, nested too deep, a key twice, NaN or infinity, or not an object.
    """
    if len(content) > limit:
        raise ValueError(f"{what} has {len(content)} bytes, at most {limit} are read")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{what} is nested too deep") from None
    except _NotStrictError as error:
        raise ValueError(f"{what} {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object but a {type(found).__name__}")
    return found


class _NotStrictError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrictError(f"has the key {twice!r:.80} twice")
    return found


def _no_constant(text: str) -> Any:
    raise _NotStrictError(f"holds {text}, which is not JSON")


MAX_HEADER_BYTES = 1 << 20
# A base has more tensors than an adapter, and its files come from whoever the user trusts with it.
MAX_BASE_HEADER_BYTES = 64 << 20
MAX_TENSORS = 20_000
MAX_METADATA_BYTES = 64 << 10
MAX_DIMENSIONS = 8
BLOCK_BYTES = 1 << 20
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
# The upper bytes whose five exponent bits are all set.
F16_NONFINITE = bytes(sign | 0x7C | rest for sign in (0, 0x80) for rest in range(4))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensor_entries(path: Path, *, header_limit: int = MAX_HEADER_BYTES) -> list[TensorEntry]:
    """Read the header of the safetensors file at `path`; entries come in the order of their bytes.

    Raises:
        ValueError: the header is over budget, or is not one that describes exactly the bytes of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path.name} is truncated or no safetensors file: {size} bytes, header of {length}")
        if length > header_limit:
            raise ValueError(f"{path.name} has a header of {length} bytes, at most {header_limit} are read")
        header = strict_json(file.read(length), what=f"the header of {path.name}", limit=header_limit)
    _check_metadata(header.pop("__metadata__", {}), path.name)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{path.name} lists {len(header)} tensors, at most {MAX_TENSORS} are read")
    entries = sorted(
        (_entry(name, found, 8 + length) for name, found in header.items()), key=lambda e: (e.start, e.end)
    )
    expected = 8 + length
    for entry in entries:
        if entry.start != expected:
            raise ValueError(f"{path.name}: the bytes of {entry.name!r:.120} overlap others or leave a gap")
        expected = entry.end
    if expected != size:
        raise ValueError(f"{path.name} has {size} bytes, its header accounts for {expected}: truncated, or more behind")
    return entries


def write_tensors(source: Path, target: Path, names: Mapping[str, str], rows: Mapping[str, int] | None = None) -> None:
    """Copy the tensors of `source` that are in `names` (old name -> new name) to the new file `target`, byte for byte.

    Of those in `rows` (old name -> n), the first n rows are left out.
    """
    kept = [
        _without_rows(entry, (rows or {}).get(entry.name, 0))
        for entry in read_tensor_entries(source)
        if entry.name in names
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in kept:
        size = entry.end - entry.start
        offsets = [position, position + size]
        header[names[entry.name]] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position += size
    written = json.dumps(header).encode()
    with source.open("rb") as file, target.open("xb") as out:
        out.write(len(written).to_bytes(8, "little") + written)
        for entry in kept:
            file.seek(entry.start)
            remaining = entry.end - entry.start
            while remaining > 0:
                block = file.read(min(BLOCK_BYTES, remaining))
                out.write(block)
                remaining -= len(block)


def _without_rows(entry: TensorEntry, count: int) -> TensorEntry:
    if not count:
        return entry
    each = (entry.end - entry.start) // entry.shape[0]
    shape = (entry.shape[0] - count, *entry.shape[1:])
    return TensorEntry(entry.name, entry.dtype, shape, entry.start + count * each, entry.end)


def nonfinite_tensors(path: Path, entries: list[TensorEntry]) -> Iterator[str]:
    """Yield the names of floating-point tensors that hold NaN or infinity, reading 1 MiB at a time."""
    with path.open("rb") as file:
        for entry in entries:
            if entry.dtype not in FLOATS:
                continue
            file.seek(entry.start)
            remaining = entry.end - entry.start
            while remaining > 0:
                block = file.read(min(BLOCK_BYTES, remaining))
                if not all_finite(block, entry.dtype):
                    yield entry.name
                    break
                remaining -= len(block)


def all_finite(block: bytes, dtype: str) -> bool:
    """Whether no value has an exponent of ones, which NaN and infinities have. By bytes: numpy is half of a core's size."""
    width = 4 if dtype == "F32" else 2
    top = block[width - 1 :: width]
    if dtype == "F16":
        return len(top.translate(None, F16_NONFINITE)) == len(top)
    if b"\x7f" not in top and b"\xff" not in top:
        return True
    # The lowest bit of the exponent is in the byte below.
    return not any(low & 0x80 and high & 0x7F == 0x7F for high, low in zip(top, block[width - 2 :: width], strict=True))


def _entry(name: str, found: Any, data_start: int) -> TensorEntry:
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.120} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name!r:.120} has the unknown dtype {dtype!r:.40}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r:.120} has a shape or offsets that are not lists of counts")
    size = DTYPE_BYTES[dtype]
    for dimension in shape:
        size *= dimension
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r:.120} of shape {shape} in {dtype} needs {size} bytes, has {offsets}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _counts(found: Any) -> bool:
    # Booleans are ints in Python; 2**48 keeps products of eight dimensions cheap to compute.
    return isinstance(found, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in found)


def _check_metadata(metadata: Any, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name} has metadata that is not text to text")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_BYTES:
        raise ValueError(f"{name} has more than {MAX_METADATA_BYTES} bytes of metadata")
