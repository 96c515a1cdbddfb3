"""Several adapters become one new version, with the recipe to build it again and its measured error."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from adapterhub_lite.adapter_format.lora_config import MAX_RANK, LoraConfigFile, read_lora_config
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE, MergeMethod, MergeRecipe, ParentRecord
from adapterhub_lite.bases import ResolvedBase, find_base
from adapterhub_lite.errors import BaseMismatchError, MergeError, UnknownNameError, UsageError
from adapterhub_lite.merging.deltas import Factors
from adapterhub_lite.merging.refusals import refuse_variants
from adapterhub_lite.registry import AdapterManifest, AdapterReference, AdapterRegistry
from adapterhub_lite.registry.store.store import file_record


@dataclass(frozen=True)
class MergedAdapter:
    """The new version, and how far it is from the exact weighted sum (Frobenius norm, relative)."""

    manifest: AdapterManifest
    relative_error: float


def merge_adapters(
    references: Sequence[str | AdapterReference],
    weights: Sequence[float] | None = None,
    method: MergeMethod = "cat",
    *,
    rank: int | None = None,
    seed: int = 0,
    density: float = 0.5,
    name: str = "merged",
    registry: AdapterRegistry | None = None,
    base: ResolvedBase | None = None,
    tags: Sequence[str] = (),
) -> MergedAdapter:
    """Merge adapters of one base into the next version of `name`: sum of `weights` (default 1 each) times their deltas.

    `cat`, the default, is exact; its rank is the sum of theirs. `svd`, `ties` and `dare_ties` give a result of `rank`
    (default: that sum, at most what a matrix can have). `density` is what `ties` and `dare_ties` keep of each delta.
    `base` None: the parents' base, where it is in this home. Every computation is in fp32 or better.

    Raises:
        MergeError: it would be silently wrong (DoRA, LoRA biases, weights that cancel, rank over the limit).
        BaseMismatchError: the parents are for different bases.
        IntegrityError: the weights of a parent are damaged here.
        UsageError: settings that make no sense.
    """
    registry = registry or AdapterRegistry()
    parents = [registry.resolve(reference) for reference in references]
    shares = [float(w) for w in weights] if weights is not None else [1.0] * len(parents)
    _check_settings(parents, shares, method, density, rank)
    base = base or find_base(parents[0].base, registry.home)
    if base is None:
        raise UsageError(f"Merging for {parents[0].base.id!r} needs that base on this machine. Give base=.")
    records = tuple(
        ParentRecord(reference=m.reference, digest=m.digest, weight=w) for m, w in zip(parents, shares, strict=True)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built = _build(registry, parents, shares, method, rank, seed, density, folder, base.model_id)
        recipe = MergeRecipe(
            method=method,
            rank=built.rank,
            seed=seed,
            density=density if method in ("ties", "dare_ties") else None,
            relative_error=built.error,
        )
        manifest = registry.add(folder, name, base=base, parents=records, recipe=recipe, tags=tags)
    return MergedAdapter(manifest, built.error)


def rebuild_merge(reference: str | AdapterReference, *, registry: AdapterRegistry | None = None) -> bool:
    """Build a merge again from its parents and recipe; whether the weights are the same, bit for bit.

    Raises:
        UsageError: it is no merge.
        UnknownNameError: a parent is not here any more.
    """
    registry = registry or AdapterRegistry()
    manifest = registry.resolve(reference)
    recipe = manifest.recipe
    if recipe is None:
        raise UsageError(f"{manifest.reference} is not a merge; there is nothing to build again.")
    parents = []
    for parent in manifest.parents:
        try:
            parents.append(registry.resolve(parent.digest))
        except UnknownNameError as error:
            raise UnknownNameError(f"The parent {parent.reference} ({parent.digest}) is not here; pull it.") from error
    shares = [parent.weight for parent in manifest.parents]
    density = recipe.density if recipe.density is not None else 1.0
    with tempfile.TemporaryDirectory() as scratch:
        _build(
            registry, parents, shares, recipe.method, recipe.rank, recipe.seed, density, Path(scratch), manifest.base.id
        )
        return file_record(Path(scratch) / WEIGHTS_FILE) == manifest.files[WEIGHTS_FILE]


@dataclass(frozen=True)
class _Built:
    rank: int
    error: float


def _build(
    registry: AdapterRegistry,
    parents: Sequence[AdapterManifest],
    shares: Sequence[float],
    method: str,
    rank: int | None,
    seed: int,
    density: float,
    folder: Path,
    base_id: str,
) -> _Built:
    """Write the merged adapter as a plain PEFT folder."""
    import torch
    from safetensors.torch import save_file

    from adapterhub_lite.merging.deltas import as_tensors, one_thread, read_factors
    from adapterhub_lite.merging.methods import METHODS, Part, Settings
    from adapterhub_lite.merging.receipts import relative_error

    loaded = [read_factors(registry.file(m, WEIGHTS_FILE, verify=True), m.lora) for m in parents]
    widest = _rank_limit(loaded)
    settings = Settings(min(rank or widest, MAX_RANK), density, seed)
    merged: dict[str, Factors] = {}
    with one_thread():
        for module in sorted({module for factors in loaded for module in factors}):
            # The key names the parent by what it is, so that its name here does not change what is dropped.
            parts = [
                Part(factors[module], weight, f"{index}:{parent.digest}:{module}")
                for index, (factors, weight, parent) in enumerate(zip(loaded, shares, parents, strict=True))
                if module in factors
            ]
            merged[module] = METHODS[method](parts, settings)
        final = max(pair.rank for pair in merged.values())
        if final > MAX_RANK:
            raise MergeError(f"The merge has rank {final}, at most {MAX_RANK} is kept. Use method='svd' with a rank.")
        merged = {module: pair.padded(final) for module, pair in merged.items()}
        error = relative_error(merged, list(zip(loaded, shares, strict=True)))
    save_file(as_tensors(merged, torch.float32), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    configs = [read_lora_config(registry.file(m, CONFIG_FILE).read_bytes()) for m in parents]
    (folder / CONFIG_FILE).write_text(json.dumps(_configuration(configs, sorted(merged), final, base_id)))
    return _Built(final, error)


def _rank_limit(loaded: Sequence[dict[str, "Factors"]]) -> int:
    """The sum of the parents' ranks where it is largest, but no more than that module's matrix can have."""
    ranks: dict[str, int] = {}
    limits: dict[str, int] = {}
    for factors in loaded:
        for module, pair in factors.items():
            ranks[module] = ranks.get(module, 0) + pair.rank
            limits[module] = min(pair.b.shape[0], pair.a.shape[1])
    return max(min(ranks[module], limits[module]) for module in ranks)


def _configuration(configs: Sequence[LoraConfigFile], modules: list[str], rank: int, base_id: str) -> dict[str, object]:
    narrowed = any(config.layers_to_transform is not None or config.exclude_modules for config in configs)
    targets = sorted({target for config in configs for target in config.target_modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": rank,
        # alpha = rank scales by one: each parent's own scaling is inside the tensors.
        "lora_alpha": rank,
        "target_modules": modules if narrowed else targets,
        "fan_in_fan_out": configs[0].fan_in_fan_out,
    }


def _check_settings(
    parents: Sequence[AdapterManifest], shares: Sequence[float], method: str, density: float, rank: int | None
) -> None:
    if method not in get_args(MergeMethod):
        raise UnknownNameError.among("merge method", method, get_args(MergeMethod))
    if not parents:
        raise UsageError("Wanted at least one adapter to merge, got none.")
    if len(shares) != len(parents):
        raise UsageError(f"Wanted one weight for each of {len(parents)} adapters, got {len(shares)}.")
    if not all(math.isfinite(share) for share in shares):
        raise UsageError(f"Wanted finite weights, got {list(shares)}.")
    if not 0 < density <= 1:
        raise UsageError(f"Wanted a density above 0 and up to 1, got {density:g}.")
    if rank is not None and not 0 < rank <= MAX_RANK:
        raise UsageError(f"Wanted a rank of 1 to {MAX_RANK}, got {rank}.")
    if rank is not None and method in ("cat", "linear"):
        raise UsageError(f"The rank of {method!r} follows from its parents; use method='svd' to choose it.")
    bases = {m.base.fingerprint: m for m in parents}
    if len(bases) > 1:
        listed = "; ".join(f"{m.reference} is for {m.base.id} ({print_[:16]}...)" for print_, m in bases.items())
        raise BaseMismatchError(f"Adapters of different bases cannot be merged: {listed}.")
    for manifest in parents:
        refuse_variants(manifest)
