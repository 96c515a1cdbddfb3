"""The Blend tab's handlers: adapters and weights in, a task or a saved merge out. Knows weights, not the components."""

from collections.abc import Sequence

from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry import AdapterReference
from app.task import Task

MOST_PARTS = 3


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
