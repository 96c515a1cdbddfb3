"""One adapter becomes part of its base: a plain model folder that `AutoModelForCausalLM` loads without us.

merged = base + scaling * B @ A, in fp32 from the pristine files, rounded once to the wanted dtype. A DoRA's magnitudes
are applied to that sum, which is exact too.
"""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.binding import name_in_base
from adapterhub_lite.adapter_format.lora_config import read_lora_config
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.bases import ResolvedBase, base_fingerprint, base_modules, find_base, stored_modules
from adapterhub_lite.errors import UsageError
from adapterhub_lite.merging.deltas import Factors
from adapterhub_lite.merging.refusals import RECEIPT_FILE, refuse_base, refuse_biases, refuse_tied
from adapterhub_lite.registry import AdapterManifest, AdapterReference, AdapterRegistry
from adapterhub_lite.registry.store.store import machine_errors

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
# Beside the weights; anything else in a base's folder (other formats, caches) is not the model.
COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


@dataclass(frozen=True)
class MergedModel:
    """What was made. `relative_error` is Frobenius: (stored - (base + delta)) over delta, what rounding cost of it."""

    folder: Path
    adapter: str
    adapter_digest: str
    base_fingerprint: str
    fingerprint: str
    dtype: str
    modules: int
    relative_error: float


def merge_into_base(
    reference: str | AdapterReference,
    out: str | Path,
    dtype: "str | torch.dtype | None" = None,
    *,
    registry: AdapterRegistry | None = None,
    base: ResolvedBase | None = None,
    from_pristine: bool = False,
) -> MergedModel:
    """Write base + adapter as a model folder at `out`, which appears complete or not at all.

    `dtype` ("float32", "bfloat16", "float16") None keeps each tensor's own. `base` None: the adapter's base, where it
    is in this home.

    Raises:
        MergeError: it would be silently wrong: merged already, tied or quantised weights, LoRA biases.
        BaseMismatchError: `base` is not the one it was made for.
        IntegrityError: the adapter's weights are damaged here.
        UsageError: `out` is not empty, no such dtype, or the base is not on this machine.
    """
    registry = registry or AdapterRegistry()
    manifest = registry.resolve(reference)
    target = Path(out).expanduser()
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise UsageError(f"Wanted the dtype as one of {', '.join(DTYPES)}, got {name!r}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{str(target)!r} is there already and not empty; merge to a new folder.")
    base = base or find_base(manifest.base, registry.home)
    if base is None:
        raise UsageError(f"Merging needs the base {manifest.base.id!r} on this machine. Give base=.")
    refuse_biases(manifest)
    refuse_base(manifest, base, from_pristine=from_pristine)
    with machine_errors(f"merge {manifest.reference}", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            receipt = _write_model(registry, manifest, base, aside, name)
            aside.chmod(0o755)
            aside.replace(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return MergedModel(folder=target, **receipt)


@dataclass
class _Sums:
    """Squares of the error and of the delta, over all modules; `done` holds the modules merged."""

    wrong: float = 0.0
    delta: float = 0.0
    done: set[str] = field(default_factory=set)


def _write_model(
    registry: AdapterRegistry, manifest: AdapterManifest, base: ResolvedBase, folder: Path, dtype: str | None
) -> dict[str, Any]:
    from adapterhub_lite.merging.deltas import read_factors

    config = read_lora_config(registry.file(manifest, CONFIG_FILE).read_bytes())
    factors = read_factors(registry.file(manifest, WEIGHTS_FILE, verify=True), manifest.lora)
    changes = _by_tensor(manifest, factors, base)
    for pattern in COMPANIONS:
        for path in base.folder.glob(pattern):
            if not path.name.startswith("."):
                shutil.copyfile(path, folder / path.name)
    sums = _Sums()
    for path in sorted(base.folder.glob("*.safetensors")):
        _merge_file(path, folder / path.name, changes, dtype, config.fan_in_fan_out, sums)
    assert sums.done == set(changes), "every bound module is in one of the base's files"
    written = _set_dtype(folder / "config.json", dtype)
    receipt = {
        "adapter": manifest.reference,
        "adapter_digest": manifest.digest,
        "base_fingerprint": manifest.base.fingerprint,
        "fingerprint": base_fingerprint(folder),
        "dtype": written,
        "modules": len(changes),
        "relative_error": math.sqrt(sums.wrong / sums.delta) if sums.delta else 0.0,
    }
    (folder / ".fingerprint.json").unlink(missing_ok=True)
    (folder / RECEIPT_FILE).write_text(json.dumps(receipt, indent=1, sort_keys=True) + "\n")
    return receipt


def _by_tensor(manifest: AdapterManifest, factors: "dict[str, Factors]", base: ResolvedBase) -> "dict[str, Factors]":
    """The factors by the name of the base's tensor they are added to."""
    modules, stored = base_modules(base.folder), stored_modules(base.folder)
    config = json.loads((base.folder / "config.json").read_bytes())
    changes = {}
    for module, pair in factors.items():
        name = name_in_base(module, modules)
        assert name is not None, "bound when it was added"
        tied = config.get("tie_word_embeddings", False) and name.endswith(("lm_head", "embed_tokens", "wte"))
        if tied or name not in stored:
            raise refuse_tied(manifest, module)
        changes[f"{name}.weight"] = pair
    return changes


def _merge_file(
    source: Path, target: Path, changes: "dict[str, Factors]", dtype: str | None, transposed: bool, sums: _Sums
) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - not a dict
            weight = file.get_tensor(name)
            wanted = getattr(torch, dtype) if dtype and weight.is_floating_point() else weight.dtype
            if name in changes:
                exact = weight.float()
                delta = changes[name].change(exact.T).T if transposed else changes[name].change(exact)
                exact = exact + delta
                sums.wrong += float((exact.to(wanted).double() - exact.double()).square().sum())
                sums.delta += float(delta.double().square().sum())
                sums.done.add(name)
                weight = exact
            tensors[name] = weight.to(wanted).contiguous()
    save_file(tensors, target, metadata=metadata)


def _set_dtype(path: Path, dtype: str | None) -> str:
    config = json.loads(path.read_bytes())
    written = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    config.pop("torch_dtype", None)
    config["dtype"] = written
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return str(written)
