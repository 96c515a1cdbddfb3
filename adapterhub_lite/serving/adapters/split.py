"""What the adapter argument of a request means: a reference, a weighted sum of several, or a split's candidate.

A blend is written "sql:3*0.7+event@prod*0.3". A split sends a share of the requests for one reference to another.
Knows references only as text.
"""

import math
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from adapterhub_lite.errors import ConfigurationError, ReferenceSyntaxError


@dataclass(frozen=True)
class WeightedReference:
    """A reference with the factor on its delta."""

    reference: str | Path
    weight: float = 1.0

    @property
    def factor(self) -> str:
        """The weight in the notation of blends; an exponent has no sign there, because "+" joins parts."""
        return f"*{self.weight!r}".replace("e+", "e")


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


@dataclass
class _Split:
    candidate: str
    share: Fraction
    seen: int = 0


class Splits:
    """Splits in force, by reference. Thread-safe.

    The share is exact, not drawn: of any 10 requests in a row, `share=0.1` sends one to the candidate.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._splits: dict[str, _Split] = {}

    def start(self, reference: str, candidate: str, share: float) -> None:
        """Send `share` of the requests for `reference` to `candidate` from now on.

        Raises:
            ConfigurationError: the share is not between 0 and 1, or the reference is a digest.
        """
        if reference.startswith("sha256:"):
            raise ConfigurationError("A digest always means the same bytes; start the split on a name or an alias.")
        if not 0.0 <= share <= 1.0:
            raise ConfigurationError(f"The share of a split is {share}, wanted 0 to 1, such as 0.1 for a tenth.")
        with self._lock:
            self._splits[reference] = _Split(candidate, Fraction(str(float(share))))

    def stop(self, reference: str) -> bool:
        """Send every request where its reference points, at once; False when there was no split."""
        with self._lock:
            return self._splits.pop(reference, None) is not None

    def choose(self, reference: str | Path) -> str | Path:
        """Return the reference that the next request for `reference` gets; a folder is itself."""
        with self._lock:
            split = None if isinstance(reference, Path) else self._splits.get(reference)
            if split is None:
                return reference
            before, split.seen = split.seen * split.share, split.seen + 1
            return split.candidate if int(split.seen * split.share) > int(before) else reference

    def current(self) -> dict[str, tuple[str, float]]:
        """Return the splits in force: reference -> (candidate, share)."""
        with self._lock:
            return {reference: (split.candidate, float(split.share)) for reference, split in self._splits.items()}
