"""Any source of an adapter becomes a folder with PEFT's two files, and what was done on the way is said.

A folder, a checkpoint, a run folder, a zip or tar, an adapter of MLX or llama.cpp: whichever it is, what comes out is
examined like every other folder; nothing is trusted for having been converted here.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES, PICKLED_WEIGHTS
from adapterhub_lite.adapter_format.foreign.archives import is_archive, unpack
from adapterhub_lite.adapter_format.foreign.child import convert_in_child
from adapterhub_lite.adapter_format.foreign.mlx import MLX_WEIGHTS, convert_mlx, is_mlx
from adapterhub_lite.adapter_format.foreign.renaming import plan_renaming, rewrite
from adapterhub_lite.adapter_format.foreign.runs import adapter_of_run
from adapterhub_lite.adapter_format.lora_config import MAX_CONFIG_BYTES
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.probes import PROBES_FILE
from adapterhub_lite.adapter_format.record import RECORD_FILE
from adapterhub_lite.adapter_format.safetensors_header import read_tensor_entries
from adapterhub_lite.adapter_format.strict_json import strict_json
from adapterhub_lite.errors import AdapterRejectedError

GGUF_MAGIC = b"GGUF"
MAX_FOREIGN_BYTES = 4 << 30
ARCHIVED_SIZES = {**ALLOWED_SIZES, MLX_WEIGHTS: MAX_FOREIGN_BYTES, PICKLED_WEIGHTS: MAX_FOREIGN_BYTES}


@dataclass
class Opened:
    """A folder with an adapter in it, what was done to get there, and what was left alone on the way."""

    folder: Path
    said: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)


def open_adapter(source: Path, scratch: Path, *, base: Path | None = None, convert: bool = False) -> Opened:
    """Find the adapter in `source`, and write it into the empty folder `scratch` where it is not plain PEFT yet.

    `base` is the folder of its base, which some conversions need. Pickled weights are converted only with `convert`.

    Raises:
        AdapterRejectedError: there is none, there are several, or it is of a kind that is not taken.
    """
    opened = Opened(source)
    subject = f"The adapter in {source.name!r:.100}"
    if not source.is_dir() and is_archive(source):
        opened.folder = scratch / "unpacked"
        inside, opened.left_alone = unpack(source, opened.folder, ARCHIVED_SIZES)
        opened.said.append(f"unpacked {inside or 'its top folder'} of {source.name}")
    elif source.is_dir() and not source.is_symlink() and not (source / CONFIG_FILE).exists():
        of_run = adapter_of_run(source)
        if of_run is not None:
            opened.folder, why = of_run
            opened.said.append(f"took {why}")
    if gguf := _gguf(opened.folder):
        return _converted(opened, scratch, "gguf", gguf, subject, base)
    if not opened.folder.is_dir():
        raise AdapterRejectedError(subject, ["it is no folder, no zip or tar archive and no GGUF adapter"])
    if not (opened.folder / WEIGHTS_FILE).exists() and is_mlx(opened.folder):
        target = scratch / "mlx"
        opened.said.append(convert_mlx(subject, opened.folder, target))
        opened.folder = target
    elif _plain(opened.folder / PICKLED_WEIGHTS) and not (opened.folder / WEIGHTS_FILE).exists():
        if not convert:
            why = f"{PICKLED_WEIGHTS} is a pickle, which may execute code when it is loaded"
            raise AdapterRejectedError(
                subject, [f"{why}; {WEIGHTS_FILE} is missing. Convert it in a closed process: convert=True (--convert)"]
            )
        opened = _converted(opened, scratch, "pickle", opened.folder / PICKLED_WEIGHTS, subject, base)
    _rename(opened, scratch, subject, base)
    return opened


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _gguf(source: Path) -> Path | None:
    """The GGUF file that `source` is, or the only one in a folder without another adapter."""
    if source.is_dir() and not (source / CONFIG_FILE).exists():
        found = [path for path in source.glob("*.gguf") if _plain(path)]
        source = found[0] if len(found) == 1 else source
    if not _plain(source):
        return None
    with source.open("rb") as file:
        return source if file.read(4) == GGUF_MAGIC else None


def _converted(opened: Opened, scratch: Path, kind: str, file: Path, subject: str, base: Path | None) -> Opened:
    if file.stat().st_size > MAX_FOREIGN_BYTES:
        raise AdapterRejectedError(subject, [f"{file.name:.80} has more than {MAX_FOREIGN_BYTES} bytes"])
    target = scratch / kind
    target.mkdir()
    more: list[str] = []
    if kind == "gguf":
        if base is None:
            raise AdapterRejectedError(subject, ["a GGUF adapter is converted for its base: give base= (--base)"])
        more = [str(target / CONFIG_FILE), str(base)]
    else:
        _carry(opened.folder, target)
    opened.said.append(convert_in_child(subject, kind, file, target / WEIGHTS_FILE, *more))
    return Opened(target, opened.said, opened.left_alone)


def _carry(folder: Path, target: Path) -> None:
    """Copy the small files of an adapter; what is no plain file or too large is left to the survey of the original."""
    for name in (CONFIG_FILE, PROBES_FILE, RECORD_FILE):
        path = folder / name
        if _plain(path) and path.stat().st_size <= ALLOWED_SIZES[name]:
            (target / name).write_bytes(path.read_bytes())


def _rename(opened: Opened, scratch: Path, subject: str, base: Path | None) -> None:
    """Give the tensors PEFT's names where they have others; a file that cannot be read is left to the inspection."""
    weights = opened.folder / WEIGHTS_FILE
    if not _plain(weights):
        return
    try:
        entries = read_tensor_entries(weights)
    except (OSError, ValueError):
        return
    plan = plan_renaming(subject, entries)
    if plan.changes_nothing:
        return
    target = scratch / "renamed"
    target.mkdir()
    opened.said += rewrite(subject, weights, target / WEIGHTS_FILE, plan, base)
    _carry(opened.folder, target)
    if plan.copies:
        _without_saved_modules(target / CONFIG_FILE)
    opened.folder = target


def _without_saved_modules(path: Path) -> None:
    """Take `modules_to_save` out of a configuration whose saved modules were all the base's own."""
    try:
        found: dict[str, Any] = strict_json(path.read_bytes(), what=CONFIG_FILE, limit=MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return
    found["modules_to_save"] = None
    path.write_text(json.dumps(found))
