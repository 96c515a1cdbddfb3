"""Hostile archives, runs, pickles, MLX and GGUF adapters: refused with the reason, within bounds, and nothing gets out."""

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.adapter_format.folder import inspect_folder
from adapterhub_lite.adapter_format.foreign.opening import open_adapter
from adapterhub_lite.errors import AdapterRejectedError

BUDGET_BYTES = 64 << 20
CONFIG, WEIGHTS, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
MLX_PLAIN = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
Make = Callable[[Path], Path]


def safetensors(shapes: dict[str, tuple[str, list[int]]], fill: bytes = b"\0") -> bytes:
    """A safetensors file of constant bytes, written by hand: name -> (dtype, shape)."""
    header, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = {"F32": 4, "I32": 4, "F16": 2}[dtype]
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + fill * position


PAIR = safetensors(
    {
        f"base_model.model.{MODULE}.lora_A.weight": ("F32", [2, 8]),
        f"base_model.model.{MODULE}.lora_B.weight": ("F32", [8, 2]),
    }
)
MLX_PAIR = {f"{MODULE}.lora_a": ("F32", [8, 2]), f"{MODULE}.lora_b": ("F32", [2, 8])}
SOUND = {CONFIG: json.dumps(PLAIN).encode(), WEIGHTS: PAIR}


def zipped(
    files: dict[str, bytes],
    change: Callable[[zipfile.ZipFile], object] = lambda _: None,
    packing: int = zipfile.ZIP_DEFLATED,
) -> Make:
    def make(place: Path) -> Path:
        path = place / "x.zip"
        with zipfile.ZipFile(path, "w", packing) as file:
            for name, content in files.items():
                file.writestr(name, content)
            change(file)
        return path

    return make


def tarred(
    files: dict[str, bytes], change: Callable[[tarfile.TarFile], object] = lambda _: None, kind: str = ""
) -> Make:
    def make(place: Path) -> Path:
        path = place / f"x.tar{'.gz' if kind else ''}"
        with tarfile.open(path, f"w:{kind}") as file:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            change(file)
        return path

    return make


def entry(name: str, **fields: Any) -> Callable[[tarfile.TarFile], object]:
    """Add an entry to a tar whose header has these fields."""

    def add(file: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        file.addfile(info)

    return add


def link_in_zip(file: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo(WEIGHTS)
    info.external_attr = 0o120777 << 16
    file.writestr(info, "/etc/passwd")


def with_bytes(make: Make, old: bytes, new: bytes, count: int = -1) -> Make:
    """Replace bytes of the archive that `make` writes."""

    def change(place: Path) -> Path:
        path = make(place)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, count))
        return path

    return change


def cut(make: Make) -> Make:
    def change(place: Path) -> Path:
        path = make(place)
        path.write_bytes(path.read_bytes()[:-200])
        return path

    return change


def folder(files: dict[str, bytes], change: Callable[[Path], object] = lambda _: None) -> Make:
    def make(place: Path) -> Path:
        root = place / "folder"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        change(root)
        return root

    return make


def file(name: str, content: bytes) -> Make:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def mlx(config: Any = MLX_PLAIN, weights: bytes | None = None) -> Make:
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    return folder({CONFIG: content, MLX: safetensors(MLX_PAIR) if weights is None else weights})


def no_link(root: Path) -> None:
    (root / "run").mkdir(parents=True)
    (root / "run" / "checkpoint-1").symlink_to("/etc")


def pax_bomb(place: Path) -> Path:
    import gzip

    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    path = place / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(info.tobuf(tarfile.PAX_FORMAT)[-512:])
        for _ in range(64):
            out.write(b"1" * (1 << 20))
    return path


ZEROS = bytes(64 << 20)
CASES: dict[str, tuple[Make, str]] = {
    "zip without an adapter": (zipped({"x": b"x"}), "holds no adapter_config.json"),
    "zip that is text": (file("x.zip", b"hello" * 100), "cannot be read as an archive"),
    "zip cut off": (cut(zipped(SOUND)), "cannot be read as an archive"),
    "zip bomb": (zipped({**SOUND, WEIGHTS: ZEROS}), "grows more than 100 times"),
    "zip with a huge configuration": (zipped({**SOUND, CONFIG: b" " * (2 << 20)}), "at most 1048576 are taken"),
    "zip with a huge card": (zipped({**SOUND, "README.md": bytes(300 << 10)}), "at most 262144 are taken"),
    "zip with 5001 entries": (zipped({**SOUND, **{f"{i}": b"" for i in range(5001)}}), "at most 5000 are read"),
    "zip of two adapters": (zipped({f"{n}/{f}": c for n in "ab" for f, c in SOUND.items()}), r"2 adapters \(a, b\)"),
    "zip in a zip": (zipped({"x.zip": b"PK"}), "holds no adapter_config.json"),
    "zip with a link for weights": (zipped({CONFIG: SOUND[CONFIG]}, link_in_zip), f"{WEIGHTS} is missing"),
    "zip that walks up": (zipped({f"../{name}": content for name, content in SOUND.items()}), "holds no adapter_config.json"),
    "zip from the root": (zipped({f"/tmp/{name}": content for name, content in SOUND.items()}), "holds no adapter_config.json"),
    "zip with backslashes": (zipped({f"..\\{name}": content for name, content in SOUND.items()}), "holds no adapter_config"),
    "zip with a folder for a file": (zipped({f"{CONFIG}/": b"", WEIGHTS: PAIR}), "holds no adapter_config.json"),
    "zip whose bytes were changed": (
        with_bytes(zipped(SOUND, packing=zipfile.ZIP_STORED), b'"r": 2', b'"r": 4'), "cannot be read as an archive",
    ),
    "zip of an unknown packing": (with_bytes(zipped(SOUND), b"\x08\x00", b"\x63\x00"), "cannot be read as an archive"),
    "zip with a pickle alone": (zipped({CONFIG: SOUND[CONFIG], "adapter_model.bin": b"x"}), "--convert"),
    "zip with a broken file": (zipped({**SOUND, WEIGHTS: b"junk" * 99}), "no safetensors file"),
    "tar without an adapter": (tarred({"x": b"x"}), "holds no adapter_config.json"),
    "tar that is text": (file("x.tar", b"hello" * 1000), "cannot be read as an archive"),
    "tar.gz that is text": (file("x.tar.gz", b"\x1f\x8bhello" * 100), "cannot be read as an archive"),
    "tar.gz cut off": (cut(tarred({**SOUND, "z": bytes(range(256)) * 400}, kind="gz")), "cannot be read as an archive"),
    "tar with a link for weights": (
        tarred({CONFIG: SOUND[CONFIG]}, entry(WEIGHTS, type=tarfile.SYMTYPE, linkname="/etc/passwd")), f"{WEIGHTS} is missing",
    ),
    "tar with a hard link": (
        tarred({WEIGHTS: PAIR}, entry(CONFIG, type=tarfile.LNKTYPE, linkname="/etc/passwd")), "holds no adapter_config.json",
    ),
    "tar with a pipe": (tarred({WEIGHTS: PAIR}, entry(CONFIG, type=tarfile.FIFOTYPE)), "holds no adapter_config.json"),
    "tar with a device": (tarred({WEIGHTS: PAIR}, entry(CONFIG, type=tarfile.CHRTYPE)), "holds no adapter_config.json"),
    "tar that walks up": (tarred({f"a/../../{name}": c for name, c in SOUND.items()}), "holds no adapter_config.json"),
    "tar from the root": (tarred({f"/{name}": content for name, content in SOUND.items()}), "holds no adapter_config.json"),
    "tar with 5001 entries": (tarred({f"{i}": b"" for i in range(5001)}), "more than 5000 entries"),
    "tar that announces a terabyte": (tarred({}, entry("x", size=1 << 40)), "announce more than"),
    "tar.gz bomb": (tarred({"x": ZEROS, **SOUND}, kind="gz"), "announce more than"),
    "tar header of a gigabyte": (pax_bomb, "cannot be read as an archive"),
    "tar twice the same": (tarred(SOUND, entry(CONFIG)), "twice|not JSON"),
    "run with a link for a checkpoint": (folder({}, no_link), "missing"),
    "run that names a path": (
        folder({"checkpoint-1/trainer_state.json": b'{"best_model_checkpoint": "/etc"}', "checkpoint-1/adapter_config.json": b"{}"}),
        f"{WEIGHTS} is missing",
    ),
    "run whose state nests": (
        folder({"checkpoint-1/trainer_state.json": b"[" * 100_000, "checkpoint-1/adapter_config.json": b"{}"}), "missing",
    ),
    "MLX without settings": (mlx(b"[]"), "no adapter of MLX"),
    "MLX with settings that are a list": (mlx({"lora_parameters": [1]}), "no adapter of MLX"),
    "MLX with a scale that is text": (mlx({"lora_parameters": {"scale": "big"}}), "no adapter of MLX"),
    "MLX with a scale of a million": (mlx({"lora_parameters": {"scale": 1e6}}), "lora_alpha|scales by"),
    "MLX with a scale beyond numbers": (mlx(b'{"lora_parameters": {"scale": 1e999}}'), "lora_alpha|not JSON"),
    "MLX with all weights": (mlx({"fine_tune_type": "full"}), "only a LoRA or DoRA of MLX"),
    "MLX with other tensors": (mlx(weights=safetensors({"model.norm.weight": ("F32", [8])})), "only a LoRA or DoRA of MLX"),
    "MLX in integers": (mlx(weights=safetensors({f"{MODULE}.lora_a": ("I32", [8, 2])})), "only a LoRA or DoRA of MLX"),
    "MLX with half a pair": (mlx(weights=safetensors({f"{MODULE}.lora_a": ("F32", [8, 2])})), "wanted .*found"),
    "MLX with a vector": (mlx(weights=safetensors({f"{MODULE}.lora_a": ("F32", [8])})), "only a LoRA or DoRA of MLX"),
    "MLX of rank zero": (mlx(weights=safetensors({f"{MODULE}.lora_a": ("F32", [8, 0]), f"{MODULE}.lora_b": ("F32", [0, 8])})), "r: "),
    "MLX of NaN": (mlx(weights=safetensors(MLX_PAIR, fill=b"\xff")), "NaN or infinite"),
    "MLX cut off": (mlx(weights=safetensors(MLX_PAIR)[:-4]), "no adapter of MLX"),
    "MLX that walks up": (mlx(weights=safetensors({"../../x.lora_a": ("F32", [8, 2])})), "only a LoRA or DoRA of MLX"),
    "MLX in NumPy's format": (folder({CONFIG: json.dumps(MLX_PLAIN).encode(), "adapters.npz": b"PK"}), f"{WEIGHTS} is missing"),
    "names that become one": (
        folder({
            CONFIG: SOUND[CONFIG],
            WEIGHTS: safetensors({
                f"base_model.model.{MODULE}.lora_A.weight": ("F32", [2, 8]),
                f"base_model.model.{MODULE}.lora_A.default.weight": ("F32", [2, 8]),
            }),
        }),
        "one name once wrappers",
    ),
    "a link to an archive": (lambda place: _linked(place), "no folder, no zip"),
}  # fmt: skip


def _linked(place: Path) -> Path:
    zipped(SOUND)(place).rename(place / "real.zip")
    (place / "x.zip").symlink_to(place / "real.zip")
    return place / "x.zip"


def take(source: Path, scratch: Path, **options: Any) -> None:
    """Open and examine a source as `add` does, without a registry around it."""
    inspect_folder(open_adapter(source, scratch, **options).folder).accepted()


def test_there_are_many_and_what_they_are_made_from_is_sound(tmp_path: Path) -> None:
    assert len(CASES) >= 40
    for number, make in enumerate((zipped(SOUND), tarred(SOUND), tarred(SOUND, kind="gz"), folder(SOUND), mlx())):
        place, scratch = tmp_path / f"p{number}", tmp_path / f"s{number}"
        place.mkdir()
        scratch.mkdir()
        take(make(place), scratch)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_nothing_gets_out(name: str, tmp_path: Path) -> None:
    make, reason = CASES[name]
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    place.mkdir()
    scratch.mkdir()
    source = make(place)
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(scratch))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRejectedError, match=reason) as caught:
            take(source, scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BUDGET_BYTES and len(str(caught.value)) < 6000
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(scratch)) == before
    assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) < 8 << 20


def pickle_of(value: Any) -> bytes:
    import torch

    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def gguf_of(kind: str, alpha: bool = True, architecture: str = "llama") -> bytes:
    """The header of a GGUF file of general.type `kind`, without tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)]
    pairs += [
        text("general.type") + struct.pack("<I", 8) + text(kind),
        text("adapter.type") + struct.pack("<I", 8) + text("lora"),
    ]
    pairs += [text("adapter.lora.alpha") + struct.pack("<If", 6, 8.0)] if alpha else []
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


CHILD_CASES: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "pickle that acts": (
        lambda: {"adapter_model.bin": b"cposix\nsystem\n(S'touch /tmp/adapterhub-was-here'\ntR."}, "could not be converted",
    ),
    "pickle of an object": (lambda: {"adapter_model.bin": pickle_of({"a": Path("/")})}, "could not be converted"),
    "pickle of numbers": (lambda: {"adapter_model.bin": pickle_of({"a": 3})}, "not everything in it is a tensor"),
    "pickle of a list": (lambda: {"adapter_model.bin": pickle_of([1])}, "it holds a list"),
    "GGUF of a model": (lambda: {"x.gguf": gguf_of("model")}, "no LoRA adapter"),
    "GGUF without alpha": (lambda: {"x.gguf": gguf_of("adapter", alpha=False)}, "could not be converted"),
    "GGUF of an unknown architecture": (lambda: {"x.gguf": gguf_of("adapter", architecture="evil")}, "converted are"),
    "GGUF of 2**60 tensors": (lambda: {"x.gguf": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0)}, "could not be converted"),
    "GGUF with a string of 2**60": (
        lambda: {"x.gguf": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60)}, "could not be converted",
    ),
    "GGUF without tensors": (lambda: {"x.gguf": gguf_of("adapter")}, "no LoRA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHILD_CASES)
def test_what_a_child_process_reads_is_refused(name: str, tiny_base: Path, tmp_path: Path) -> None:
    make, reason = CHILD_CASES[name]
    files = make()
    source = folder(files if "x.gguf" in files else {CONFIG: SOUND[CONFIG], **files})(tmp_path)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(AdapterRejectedError, match=reason):
        take(source, tmp_path / "scratch", base=tiny_base, convert=True)
    assert not Path("/tmp/adapterhub-was-here").exists()
