"""Hostile and broken safetensors files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.registry.hostile.case import WEIGHTS, Case, Spoil, put


def header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Rewrite the safetensors header and keep the bytes behind it."""

    def spoil(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        found = json.loads(content[8 : 8 + length])
        change(found)
        written = json.dumps(found).encode()
        put(folder / WEIGHTS, struct.pack("<Q", len(written)) + written + content[8 + length :])

    return spoil


def raw(change: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of the weights file."""
    return lambda folder: put(folder / WEIGHTS, change((folder / WEIGHTS).read_bytes()))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    """Load, change and save the tensors, as somebody with the usual tools would."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return spoil


def _first(found: dict[str, Any]) -> str:
    return sorted(name for name in found if name != "__metadata__")[0]


def _empty_tensors(folder: Path) -> None:
    entries = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(700_000))
    written = ("{" + entries + "}").encode()
    put(folder / WEIGHTS, struct.pack("<Q", len(written)) + written)


def _fewer_but_empty(folder: Path) -> None:
    entries = ",".join(f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(20_500))
    written = ("{" + entries + "}").encode()
    assert len(written) > 1 << 20
    put(folder / WEIGHTS, struct.pack("<Q", len(written)) + written)


def _value(value: float, dtype: str | None = None) -> Spoil:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        import torch

        found = {name: t.to(getattr(torch, dtype)) if dtype else t for name, t in found.items()}
        found[_first(found)].view(-1)[-1] = value
        return found

    return tensors(change)


def _as_dtype(dtype: str) -> Spoil:
    import torch

    return tensors(lambda found: {name: t.to(getattr(torch, dtype)) for name, t in found.items()})


def _renamed(old: str, new: str) -> Spoil:
    return tensors(lambda found: {name.replace(old, new): t for name, t in found.items()})


def _without(part: str) -> Spoil:
    return tensors(lambda found: {name: t for name, t in found.items() if part not in name})


def _metadata_bomb(found: dict[str, Any]) -> None:
    found["__metadata__"] = {"x": "y" * (90 << 20)}


def _more_metadata(found: dict[str, Any]) -> None:
    found["__metadata__"] = {"x": "y" * (100 << 10)}


def _overlap(found: dict[str, Any]) -> None:
    one, two = sorted(name for name in found if name != "__metadata__")[:2]
    found[two]["data_offsets"] = found[one]["data_offsets"]
    found[two]["shape"], found[two]["dtype"] = found[one]["shape"], found[one]["dtype"]


def _overflow(found: dict[str, Any]) -> None:
    found[_first(found)]["shape"] = [1 << 33, 1 << 33]


def _negative(found: dict[str, Any]) -> None:
    found[_first(found)]["shape"] = [-4, -32]


def _duplicate_tensor(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].decode().rstrip()
    found = json.loads(text)
    name = _first(found)
    written = (text[:-1] + f',"{name}":{json.dumps(found[name])}}}').encode()
    put(folder / WEIGHTS, struct.pack("<Q", len(written)) + written + content[8 + length :])


def _another_shape(found: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.zeros(4, 48) if "lora_A" in name else t for name, t in found.items()}


def _sparse_giant(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(5 << 40)


WEIGHT_CASES = [
    Case("no weights", lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    Case("empty file", raw(lambda content: b""), "truncated or no safetensors"),
    Case("truncated file", raw(lambda content: content[: len(content) // 2]), "truncated, or more behind"),
    Case("truncated header", raw(lambda content: content[:40]), "truncated or no safetensors"),
    Case(
        "header of 2^63 bytes",
        raw(lambda content: struct.pack("<Q", 1 << 63) + content[8:]),
        "truncated or no safetensors",
    ),
    Case("pickle in disguise", raw(lambda content: b"\x80\x04\x95" + content), "truncated or no safetensors"),
    Case("zip behind the tensors", raw(lambda content: content + b"PK\x05\x06" + bytes(18)), "more behind"),
    Case("terabytes of nothing", _sparse_giant, "at most 4294967296 are taken"),
    Case("700k empty tensors", _empty_tensors, "at most 1048576 are read"),
    Case("many empty tensors", _fewer_but_empty, "at most 1048576 are read"),
    Case("metadata of 90 MB", header(_metadata_bomb), "at most 1048576 are read"),
    Case("metadata of 100 kB", header(_more_metadata), "65536 bytes of metadata"),
    Case("overlapping tensors", header(_overlap), "overlap others or leave a gap"),
    Case("overflowing shape", header(_overflow), "needs 295147905179352825856 bytes"),
    Case("negative shape", header(_negative), "not lists of counts"),
    Case("tensor twice", _duplicate_tensor, "twice"),
    Case("NaN", _value(float("nan")), "NaN or infinite values in base_model"),
    Case("infinity in bf16", _value(float("inf"), "bfloat16"), "NaN or infinite values in base_model"),
    Case("minus infinity in fp16", _value(float("-inf"), "float16"), "NaN or infinite values in base_model"),
    Case("integers", _as_dtype("int32"), "not in F32, F16 or BF16"),
    Case("doubles", _as_dtype("float64"), "not in F32, F16 or BF16"),
    Case("no module bound", _renamed("layers", "blocks"), r"0 of 6 modules"),
    Case("a layer missing", _without("layers.1."), r"3 of 6 modules are bound; no tensors for model.layers.1"),
    Case("a module left over", _renamed("v_proj", "o_proj"), "have tensors but are not targeted"),
    Case("half a pair", _without("lora_B"), r"wanted \['lora_A.weight', 'lora_B.weight'\], found"),
    Case(
        "for a base of another shape",
        tensors(_another_shape),
        r"the change is \[\d+, 48\], the base's weight \[\d+, 32\]",
    ),
    Case("a half on an embedding", _renamed("lora_A.weight", "lora_embedding_A"), "wanted .* found"),
    Case("path as tensor name", _renamed("base_model.model.", "base_model.model.../../etc/"), "are not LoRA weights"),
    Case("magnitudes without DoRA", _renamed("lora_B.weight", "lora_magnitude_vector"), "found"),
]
