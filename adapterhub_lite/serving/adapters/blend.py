"""The notation of an adapter in a request: one reference, or a weighted sum "sql:3*0.7+event@prod*0.3"."""

import math
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.errors import ReferenceSyntaxError


@dataclass(frozen=True)
class WeightedReference:
    """A reference with the factor on its delta."""

    reference: str | Path
    weight: float = 1.0


def parse_blend(adapter: str | Path) -> tuple[WeightedReference, ...]:
    """Split an adapter argument into its parts; a `Path` is a folder, one part of weight 1. A string never is a path.

    The answer of a blend is that of base + sum(weight * delta), exactly: the deltas add, nothing is averaged.

    Raises:
        ReferenceSyntaxError: an empty part, or a weight that is not a finite number.
    """
    if isinstance(adapter, Path):
        return (WeightedReference(adapter),)
    parts = []
    for piece in adapter.split("+"):
        reference, star, weight = piece.strip().partition("*")
        try:
            factor = float(weight) if star else 1.0
        except ValueError:
            factor = math.nan
        if not reference.strip() or not math.isfinite(factor):
            raise ReferenceSyntaxError(
                f"{adapter!r} is not an adapter: wanted a reference such as sql@prod, or parts joined by +, each with a "
                f"finite weight, such as sql:3*0.7+event@prod*0.3, but found {piece.strip()!r}."
            )
        parts.append(WeightedReference(reference.strip(), factor))
    return tuple(parts)
