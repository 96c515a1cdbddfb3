"""The way out: a version as a plain folder that PEFT reads without us, in vLLM's layout, or as a GGUF LoRA."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
)
from adapterhub_lite.bases import ResolvedBase, find_base
from adapterhub_lite.errors import ConfigurationError, UsageError
from adapterhub_lite.registry.operations.sign import Signature
from adapterhub_lite.registry.store.store import Store

CONVERTER = "convert_lora_to_gguf.py"


def adapter_files(store: Store, manifest: AdapterManifest) -> dict[str, Path]:
    """What is published of a version: file name -> immutable local file, each compared with the manifest.

    `adapterhub.json` is among them, and `adapterhub.sig.json` when the version is signed under the name and number it
    has here; the card is not.

    Raises:
        IntegrityError: a file is missing or damaged here; published, it could never be taken back.
    """
    published = {name: store.file(manifest, name, verify=True) for name in manifest.files}
    own = store.manifest_path(manifest.name, manifest.version)
    published[MANIFEST_FILE] = own
    signature = own.with_suffix(".sig")
    # A publisher's signature over other labels would only be refused elsewhere.
    if signature.exists() and Signature.model_validate_json(signature.read_bytes()).verifies(manifest):
        published[SIGNATURE_FILE] = signature
    return published


def export_folder(store: Store, manifest: AdapterManifest, folder: Path) -> Path:
    """Write the files of a version into `folder`, which appears complete or not at all; returns it.

    Raises:
        UsageError: `folder` is there already and not empty.
        IntegrityError: a file of the version is missing or damaged here.
    """
    return _write(folder, adapter_files(store, manifest))


def export_vllm(store: Store, manifests: Sequence[AdapterManifest], folder: Path) -> list[Path]:
    """Write versions as `folder`/<name>/ with adapter_config.json and adapter_model.safetensors alone.

    This is what vLLM's filesystem LoRA resolver reads with VLLM_LORA_RESOLVER_CACHE_DIR=`folder`: a request for the
    model `<name>` finds the adapter in the folder of that name, if vLLM serves its base under the very id that stands
    in its configuration. One version of a name at a time, for that reason.

    Raises:
        IntegrityError: a file of a version is missing or damaged here.
        UsageError: two versions of one name, or a folder of that name is there already.
        ConfigurationError: an adapter that vLLM cannot serve.
    """
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise UsageError("vLLM finds an adapter by its name alone; give one version of each.")
    for manifest in manifests:
        if not manifest.lora.is_plain:
            raise ConfigurationError(
                f"{manifest.reference} changes more than linear layers by plain pairs, which is all vLLM serves. Give vLLM "
                "its base with it merged in: `adapterhub-lite merge --into-base`."
            )
        if manifest.lora.rank_pattern or manifest.lora.alpha_pattern:
            raise ConfigurationError(
                f"{manifest.reference} is not a plain LoRA of one rank and alpha, which is all vLLM serves. "
                "Merge it with itself (`adapterhub-lite merge`) to even out its ranks."
            )
    only = (CONFIG_FILE, WEIGHTS_FILE)
    return [_write(folder / m.name, {name: store.file(m, name, verify=True) for name in only}) for m in manifests]


def export_gguf(
    store: Store,
    manifest: AdapterManifest,
    out: Path,
    *,
    base: ResolvedBase | None = None,
    converter: Path | None = None,
) -> Path:
    """Write a version as a GGUF LoRA at `out` with llama.cpp's own `convert_lora_to_gguf.py`, where that is installed.

    `base` None: the version's base, where it is in this home. `converter` None: `$LLAMA_CPP_CONVERTER`, or the script
    of that name on the path.

    Raises:
        ConfigurationError: there is no converter, or it failed; the text has its last line.
        IntegrityError: a file of the version is missing or damaged here.
        UsageError: `out` is there already, or the base is not on this machine.
    """
    named = os.environ.get("LLAMA_CPP_CONVERTER") or shutil.which(CONVERTER)
    script = converter or (Path(named) if named else None)
    if script is None or not script.is_file():
        raise ConfigurationError(
            f"Exporting to GGUF wants llama.cpp's {CONVERTER}, which is not on the path. "
            "Get it with llama.cpp, or point LLAMA_CPP_CONVERTER to it."
        )
    if out.exists():
        raise UsageError(f"{str(out)!r} is there already; export to a new file.")
    if not manifest.lora.is_plain:
        raise ConfigurationError(
            f"{manifest.reference} changes more than linear layers by plain pairs, which is all that a GGUF LoRA holds. Merge "
            "it into its base (`adapterhub-lite merge --into-base`) and convert that."
        )
    base = base or find_base(manifest.base, store.home)
    if base is None:
        raise UsageError(
            f"The converter wants {manifest.base.id!r} on this machine. Give base= (command line: --base)."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        files = {name: store.file(manifest, name, verify=True) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        plain = _write(Path(scratch) / "adapter", files)
        made = Path(scratch) / "adapter.gguf"
        command = [sys.executable, str(script), "--base", str(base.folder), "--outfile", str(made), str(plain)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not made.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigurationError(f"{CONVERTER} could not convert {manifest.reference}: {last}")
        made.replace(out)
    return out


def _write(folder: Path, files: Mapping[str, Path]) -> Path:
    """Copy files into `folder`, which appears complete or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is there already and not empty; export to a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, path in files.items():
            # copyfile, not copy: an export belongs to its owner, who may change it.
            shutil.copyfile(path, aside / name)
        aside.chmod(0o777 & ~_umask())
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
