"""Checkpoints that are whole or not there: written aside, hashed, read back, renamed. Knows files and tensors only."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapterhub_lite.errors import IntegrityError

WEIGHT_FILES = "*.safetensors"
HASHES_FILE = "hashes.json"
STAGING = ".writing"


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the sha256 of each tensor's dtype, shape and bytes, by name."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{flat.dtype}:{tuple(flat.shape)}:".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def seal(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the weights in `folder` back, compare it with `tensors` in memory, and write every hash into `hashes.json`.

    Raises:
        IntegrityError: a tensor does not read back as it is in memory.
    """
    wanted = tensor_hashes(tensors)
    found: dict[str, str] = {}
    for path in sorted(folder.glob(WEIGHT_FILES)):
        found |= tensor_hashes(load_file(path))
    _compare(wanted, found, f"{folder}, read back,")
    # Engines that shard the optimizer write it into folders of their own.
    files = {str(path.relative_to(folder)): _file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / HASHES_FILE).write_text(json.dumps({"files": files, "tensors": wanted}, indent=1))


def publish(staged: Path, target: Path) -> None:
    """Move the checkpoint `staged` to `target`, where it appears whole by one rename, and outlasts a power cut.

    A checkpoint of the same step that is there already, from the run before an interruption, is replaced.
    """
    for path in staged.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        target.rename(staged.with_name("replaced"))
    staged.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(folder: Path) -> dict[str, str] | None:
    """Check every file of a checkpoint against its hashes; returns those of its tensors, None where none were kept.

    Raises:
        IntegrityError: a file is missing or is not what was written.
    """
    path = folder / HASHES_FILE
    if not path.exists():
        return None
    sealed: dict[str, Any] = json.loads(path.read_bytes())
    found = {name: _file_hash(folder / name) for name in sealed["files"] if (folder / name).is_file()}
    _compare(sealed["files"], found, f"The checkpoint {folder}")
    return dict(sealed["tensors"])


def check_loaded(wanted: Mapping[str, str], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check that `tensors` in memory are those that were saved in `folder`.

    Raises:
        IntegrityError: one of them is not.
    """
    _compare(wanted, tensor_hashes(tensors), f"What was loaded from {folder}")


def sweep(output_dir: Path) -> None:
    """Remove what a killed run left half written in `output_dir`."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def _compare(wanted: Mapping[str, str], found: Mapping[str, str], subject: str) -> None:
    wrong = sorted(name for name in wanted if found.get(name) != wanted[name])
    if wrong:
        shown = ", ".join(wrong[:3])
        raise IntegrityError(
            f"{subject} differs from what was saved in {len(wrong)} of {len(wanted)} parts ({shown}). "
            "Resume from an earlier checkpoint, and check the disk."
        )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
