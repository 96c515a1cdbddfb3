"""How two versions differ: configuration, data, metrics, and the two changes themselves, layer by layer. Torch on use.

Subspace similarity of two LoRAs on one module: the mean squared cosine of the principal angles between what their
deltas read (rows of A) or write (columns of B), as in section 7.2 of https://arxiv.org/abs/2106.09685: 1 is the same
subspace, 0 an orthogonal one; two random ones score about rank / dimension.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.binding import read_pairs
from adapterhub_lite.adapter_format.manifest import WEIGHTS_FILE, AdapterManifest
from adapterhub_lite.registry.store.store import Store

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerDifference:
    """One module: similarity of what is read and written (0 to 1), cosine of the deltas, and the deltas' norms.

    Where only one of the two adapts the module, the similarities are 0 and the other's norm is 0.
    """

    module: str
    input_similarity: float
    output_similarity: float
    cosine: float
    norm: float
    other_norm: float


@dataclass(frozen=True)
class AdapterDifference:
    """What differs: `fields` maps a dotted name in the manifest to both values, `metrics` a metric to both values."""

    one: str
    other: str
    same_base: bool
    fields: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[float | None, float | None]]
    layers: tuple[LayerDifference, ...]


def compare_versions(
    store: Store, one: AdapterManifest, other: AdapterManifest, *, layers: bool = True
) -> AdapterDifference:
    """Compare two versions; without `layers` only what their manifests say, and without loading torch."""
    skipped = {"evaluation", "name", "version", "created", "files", "digest"}
    ours = _flat(one.model_dump(mode="json", exclude=skipped))
    theirs = _flat(other.model_dump(mode="json", exclude=skipped))
    fields = {
        key: (ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)
    }
    measured = [{(e.metric, e.data): e.adapter_value for e in m.evaluation} for m in (one, other)]
    metrics = {
        f"{metric} on {data}": (measured[0].get((metric, data)), measured[1].get((metric, data)))
        for metric, data in sorted({*measured[0], *measured[1]})
    }
    return AdapterDifference(
        one=one.reference,
        other=other.reference,
        same_base=one.base.fingerprint == other.base.fingerprint,
        fields=fields,
        metrics=metrics,
        layers=_compare_layers(store, one, other) if layers else (),
    )


def _compare_layers(store: Store, one: AdapterManifest, other: AdapterManifest) -> tuple[LayerDifference, ...]:
    ours, theirs = (_read_pairs(store, manifest) for manifest in (one, other))
    return tuple(_compare_module(module, ours.get(module), theirs.get(module)) for module in sorted({*ours, *theirs}))


def _compare_module(module: str, ours: Any, theirs: Any) -> LayerDifference:
    norm, other_norm = (0.0 if pair is None else float(_inner(pair, pair)) ** 0.5 for pair in (ours, theirs))
    shapes_differ = ours is not None and theirs is not None and _shape(ours) != _shape(theirs)
    if ours is None or theirs is None or shapes_differ:
        return LayerDifference(module, 0.0, 0.0, 0.0, norm, other_norm)
    return LayerDifference(
        module=module,
        input_similarity=_similarity(ours[0].T, theirs[0].T),
        output_similarity=_similarity(ours[1], theirs[1]),
        cosine=float(_inner(ours, theirs)) / (norm * other_norm) if norm and other_norm else 0.0,
        norm=norm,
        other_norm=other_norm,
    )


def _similarity(one: "torch.Tensor", other: "torch.Tensor") -> float:
    """Overlap of the column spaces of two matrices of equal height, over the smaller of their ranks."""
    first, second = _basis(one), _basis(other)
    smaller = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / smaller if smaller else 0.0


def _basis(matrix: "torch.Tensor") -> "torch.Tensor":
    import torch

    # An SVD and not a QR: padding and dead directions of a LoRA would count as directions otherwise.
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > s.max() * 1e-5] if s.numel() and s.max() > 0 else u[:, :0]


def _inner(one: Any, other: Any) -> "torch.Tensor":
    """The inner product of two deltas B A, without multiplying them out."""
    product = ((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum()
    # Of a delta with itself it is a square; rounding must not make it negative.
    return product.clamp(min=0) if one is other else product


def _shape(pair: Any) -> tuple[int, int]:
    return pair[1].shape[0], pair[0].shape[1]


def _read_pairs(store: Store, manifest: AdapterManifest) -> "dict[str, tuple[Any, Any]]":
    """A and scaled B of each module, in fp64."""
    pairs = read_pairs(store.file(manifest, WEIGHTS_FILE), manifest.lora.scaling_of)
    return {module: (pair.a.double(), pair.b.double() * pair.scaling) for module, pair in pairs.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(_flat(item, f"{prefix}.{key}" if prefix else key))
    return found
