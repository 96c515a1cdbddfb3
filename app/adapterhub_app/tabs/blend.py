"""The Blend tab's handlers: adapters and weights in, a task or a saved merge out. Knows weights, not the components."""

from collections.abc import Sequence

from adapterhub_app.backend import Backend
from adapterhub_app.display.task import Task, short_digest
from adapterhub_lite.errors import UsageError
from adapterhub_lite.merging import merge_adapters
from adapterhub_lite.registry import AdapterReference

MOST_PARTS = 3
METHODS = {
    "cat · exact, rank is the sum": "cat",
    "svd · best at a rank of your choice": "svd",
    "ties · keeps the strongest changes": "ties",
    "dare_ties · random drop, then ties": "dare_ties",
}


def blend_of(picked: Sequence[str | None], weights: Sequence[float]) -> Task:
    """The blend of the adapters picked, each at its weight; unpicked places and weights of 0 are left out.

    Raises:
        UsageError: nothing is left to blend.
        ReferenceSyntaxError: a pick is no adapter reference.
    """
    parts = [
        (str(AdapterReference.parse(reference)), round(float(weight), 2))
        for reference, weight in zip(picked, weights, strict=True)
        if reference
    ]
    parts = [(reference, weight) for reference, weight in parts if weight != 0.0]
    if not parts:
        raise UsageError("There is nothing to blend yet. Pick adapters and give at least one a weight other than 0.")
    return Task(tuple(parts))


def save_blend(backend: Backend, user: str | None, blend: Task, name: str, method: str, rank: int | None) -> list[str]:
    """Save a blend as the next version of `name`; returns its receipt, one plain line each.

    `rank` None is the method's own choice. Raises what `merge_adapters` raises, and:
        UsageError: the person is no admin, or gave no name.
    """
    backend.access.require_admin(user, "save a blend")
    if not name.strip():
        raise UsageError("The merged adapter needs a name, such as sql-event.")
    references = [backend.registry.resolve(reference).reference for reference, _ in blend.parts]
    merged = merge_adapters(
        references,
        [weight for _, weight in blend.parts],
        method,  # type: ignore[arg-type]  # one of METHODS; merge_adapters refuses others
        rank=rank,
        name=name.strip(),
        registry=backend.registry,
        base=backend.base,
    )
    manifest = merged.manifest
    parents = " + ".join(f"{p.weight:g} × {p.reference} ({short_digest(p.digest)})" for p in manifest.parents)
    return [
        f"Saved as {manifest.reference}, digest {short_digest(manifest.digest)}, rank {manifest.lora.rank}.",
        f"Parents: {parents}.",
        f"Measured error against the exact weighted sum: {merged.relative_error:.2g}.",
    ]


def blend_key(session: str) -> str:
    """Under which the blend's answer of a session counts as under way, so that it leaves the chat alone."""
    return f"{session}/blend"
