"""One adapter becomes part of its base: a plain model folder that `AutoModelForCausalLM` loads without us.

Every changed parameter is computed in fp32 from the pristine files (`adapter_format/changes.py` has the formulas) and
rounded once to the wanted dtype. Where the files have the parameter under the model's name, they are rewritten one after
the other; else (experts that lie apart in the files, names of old, a head that is untied) the whole model is loaded,
changed and saved, and what transformers then loads is compared with what was meant.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE, read_added_tokens, tokenizer_with
from adapterhub_lite.adapter_format.changes import Change, Structure, read_changes
from adapterhub_lite.adapter_format.lora_config import read_lora_config
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.strict_reading import MAX_BASE_HEADER_BYTES, read_tensor_entries
from adapterhub_lite.bases import ResolvedBase, base_fingerprint, find_base, load_base_model, load_tokenizer
from adapterhub_lite.bases.load import no_progress_bars
from adapterhub_lite.bases.structure import structure_in
from adapterhub_lite.errors import MergeError, UsageError
from adapterhub_lite.merging.refusals import RECEIPT_FILE, refuse_base, refuse_tied
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
    untie: bool = False,
) -> MergedModel:
    """Write base + adapter as a model folder at `out`, which appears complete or not at all.

    `dtype` ("float32", "bfloat16", "float16") None keeps each tensor's own. `base` None: the adapter's base, where it
    is in this home. `untie` allows a model with a head of its own where the base shares it with the embedding.

    Raises:
        MergeError: it would be silently wrong: merged already, tied or quantised weights, a bias that no layer can have.
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
    refuse_base(manifest, base, from_pristine=from_pristine)
    with machine_errors(f"merge {manifest.reference}", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            receipt = _write_model(registry, manifest, base, aside, name, untie)
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

    def changed(
        self,
        name: str,
        weight: "torch.Tensor",
        steps: "Sequence[Callable[[torch.Tensor], torch.Tensor]]",
        dtype: "torch.dtype",
    ) -> "torch.Tensor":
        """The weight after `steps` in float32, rounded once to `dtype`."""
        if not steps:
            return weight.to(dtype)
        exact = weight.float()
        for step in steps:
            exact = step(exact)
        self.wrong += float((exact.to(dtype).double() - exact.double()).square().sum())
        delta = exact.double()
        # Rows of new tokens are all change.
        delta[: len(weight)] -= weight.double()
        self.delta += float(delta.square().sum())
        self.done.add(name)
        return exact.to(dtype)


def _write_model(
    registry: AdapterRegistry,
    manifest: AdapterManifest,
    base: ResolvedBase,
    folder: Path,
    dtype: str | None,
    untie: bool,
) -> dict[str, Any]:
    config = read_lora_config(registry.file(manifest, CONFIG_FILE).read_bytes())
    structure = structure_in(base.folder)
    weights = registry.file(manifest, WEIGHTS_FILE, verify=True)
    found = read_changes(weights, config, structure)
    changes = _by_parameter(manifest, found, structure)
    for pattern in COMPANIONS:
        for path in base.folder.glob(pattern):
            if not path.name.startswith("."):
                shutil.copyfile(path, folder / path.name)
    ends = {f"{one}.weight" for one in (structure.head, structure.embedding) if one}
    shared = structure.tied and bool(ends & changes.keys())
    rows = _rows_with_new(found)
    names = None if shared or rows else _names_in_files(changes, structure, base.folder)
    sums = _Sums()
    if names is not None:
        for path in sorted(base.folder.glob("*.safetensors")):
            _merge_file(path, folder / path.name, {names[one]: found for one, found in changes.items()}, dtype, sums)
        assert len(sums.done) == len(changes), "every changed parameter is in one of the base's files"
        written = _set_dtype(folder / "config.json", dtype)
    else:
        written = _merge_whole(manifest, base, folder, changes, dtype, ends if shared else set(), untie, sums, rows)
    if ADDED_TOKENS_FILE in manifest.files:
        _write_tokenizer(registry.file(manifest, ADDED_TOKENS_FILE, verify=True), base, folder)
    receipt = {
        "adapter": manifest.reference,
        "adapter_digest": manifest.digest,
        "base_fingerprint": manifest.base.fingerprint,
        "fingerprint": base_fingerprint(folder),
        "dtype": written,
        "modules": manifest.lora.modules_bound,
        "relative_error": math.sqrt(sums.wrong / sums.delta) if sums.delta else 0.0,
    }
    (folder / ".fingerprint.json").unlink(missing_ok=True)
    (folder / RECEIPT_FILE).write_text(json.dumps(receipt, indent=1, sort_keys=True) + "\n")
    return receipt


def _by_parameter(
    manifest: AdapterManifest, changes: Sequence[Change], structure: Structure
) -> dict[str, list[Callable[["torch.Tensor"], "torch.Tensor"]]]:
    """What is done to each parameter, in order: functions from float32 to float32."""
    found: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    for change in changes:
        if change.target.kind == "pair" and change.target.module not in (structure.linear or ()):
            raise MergeError(
                f"{manifest.reference} has a pair on {change.target.module!r}, which this base does not call as a linear "
                "layer: unmerged it has no effect, merged it would have one. Train it again without that layer."
            )
        found.setdefault(change.target.parameter, []).append(change.applied)
        if change.target.also_head is not None:
            found.setdefault(f"{change.target.also_head}.weight", []).append(change.applied)
        if change.bias is not None:
            name = f"{change.target.module}.bias"
            if name not in structure.parameters:
                raise MergeError(
                    f"{manifest.reference} trains a LoRA bias on {change.target.module!r}, and that layer of the base has "
                    "no bias that it could be added to. Serve it unmerged, or train it again with lora_bias=False."
                )
            more = change.bias.float() * change.scaling
            found.setdefault(name, []).append(more.add)
    return found


def _rows_with_new(changes: Sequence[Change]) -> int:
    """How many tokens there are with those that an adapter brings; 0 where it brings none."""
    return max((one.rows for one in changes if one.target.shape and one.rows > one.target.shape[0]), default=0)


def _write_tokenizer(tokens: Path, base: ResolvedBase, folder: Path) -> None:
    """Write the base's tokenizer with an adapter's own tokens into a model's folder."""
    try:
        made = tokenizer_with(read_added_tokens(tokens.read_bytes()), load_tokenizer(base.folder))
    except ValueError as error:
        raise MergeError(f"The adapter's own tokens do not fit this base: {error}.") from error
    made.save_pretrained(folder)


Steps = Mapping[str, Sequence[Callable[["torch.Tensor"], "torch.Tensor"]]]


def _names_in_files(changes: Steps, structure: Structure, folder: Path) -> dict[str, str] | None:
    """The names that the base's files have for the changed parameters; None where they do not have them all as they are."""
    entries = {
        entry.name: entry.shape
        for path in folder.glob("*.safetensors")
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    }
    # Some checkpoints leave out the first part (`transformer.`, `model.`).
    found = {
        one: name
        for one in changes
        for name in (one.partition(".")[2], one)
        if entries.get(name) == structure.shape_of(one)
    }
    return found if len(found) == len(changes) else None


def _merge_file(source: Path, target: Path, changes: Steps, dtype: str | None, sums: _Sums) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - not a dict
            weight = file.get_tensor(name)
            wanted = getattr(torch, dtype) if dtype and weight.is_floating_point() else weight.dtype
            tensors[name] = sums.changed(name, weight, changes.get(name, ()), wanted).contiguous()
    save_file(tensors, target, metadata=metadata)


def _merge_whole(
    manifest: AdapterManifest,
    base: ResolvedBase,
    folder: Path,
    changes: Steps,
    dtype: str | None,
    tied: set[str],
    untie: bool,
    sums: _Sums,
    rows: int,
) -> str:
    """Load the model, change it and save it; `tied` are the names of one weight that the base has twice.

    `rows` 0 leaves the vocabulary as it is.

    Returns the dtype. The weight stays one where both are changed alike.
    """
    import torch

    model = load_base_model(base.folder)
    torch.nn.Module.to(model, getattr(torch, dtype) if dtype else model.dtype)
    pristine = load_base_model(base.folder) if dtype else model
    found: dict[str, torch.Tensor] = {}
    for name, steps in changes.items():
        own = model.get_parameter(name)
        found[name] = sums.changed(name, pristine.get_parameter(name).data, steps, own.dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if tied and not (tied <= found.keys() and _alike([found[name] for name in tied])):
        if not untie:
            raise refuse_tied(manifest, next(name for name in sorted(tied & found.keys())).rpartition(".")[0])
        for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        for name in tied:
            path, _, parameter = name.rpartition(".")
            own = model.get_parameter(name)
            model.get_submodule(path)._parameters[parameter] = torch.nn.Parameter(own.data.clone(), requires_grad=False)
    with torch.no_grad():
        for name, weight in found.items():
            model.get_parameter(name).copy_(weight)
    for stale in ("model.safetensors.index.json", "config.json"):
        (folder / stale).unlink(missing_ok=True)
    with no_progress_bars():
        model.save_pretrained(folder)
    again = dict(load_base_model(folder).named_parameters())
    lost = [name for name, weight in model.named_parameters() if name not in again or not again[name].equal(weight)]
    if lost:
        raise MergeError(
            f"{manifest.reference} cannot be merged: transformers saves {type(model).__name__} and loads another "
            f"{lost[0]!r}. Serve it unmerged."
        )
    return str(model.dtype).removeprefix("torch.")


def _alike(weights: "Sequence[torch.Tensor]") -> bool:
    """Whether all are one weight, but for the order of sums in float32."""
    import torch

    return all(torch.allclose(weights[0].float(), one.float(), rtol=1e-5, atol=1e-7) for one in weights[1:])


def _set_dtype(path: Path, dtype: str | None) -> str:
    config = json.loads(path.read_bytes())
    written = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    config.pop("torch_dtype", None)
    config["dtype"] = written
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return str(written)
