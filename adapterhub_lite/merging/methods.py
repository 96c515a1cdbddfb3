"""How the changes of several adapters to one module become one: pure functions from factors to factors.

`cat` is exact. `svd` is the best approximation of a given rank. `ties` (https://arxiv.org/abs/2306.01708) and
`dare_ties` (https://arxiv.org/abs/2311.03099) change the sum on purpose. `linear` adds the factors themselves and so
mixes them crosswise; it is here to be measured against.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapterhub_lite.merging.deltas import Factors


@dataclass(frozen=True)
class Part:
    """One parent's share in a module. `key` (parent and module) seeds what is random."""

    factors: Factors
    weight: float
    key: str


@dataclass(frozen=True)
class Settings:
    """What a method may need: `density` is the fraction of entries that `ties` and `dare_ties` keep."""

    rank: int
    density: float
    seed: int


def cat(parts: Sequence[Part], settings: Settings) -> Factors:
    """Factors side by side: B = [w1 B1, w2 B2, ...], A = [A1; A2; ...]; exactly the weighted sum."""
    return Factors(
        torch.cat([part.factors.a for part in parts]),
        torch.cat([part.factors.b * part.weight for part in parts], dim=1),
    )


def svd(parts: Sequence[Part], settings: Settings) -> Factors:
    """The best rank-`settings.rank` approximation of the weighted sum, by way of the small core of its factors."""
    exact = cat(parts, settings)
    left, left_core = torch.linalg.qr(exact.b.double())
    right, right_core = torch.linalg.qr(exact.a.double().T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _split(left @ u, s, vh @ right.T, settings.rank)


def linear(parts: Sequence[Part], settings: Settings) -> Factors:
    """A = sum sqrt|w| A_i, B = sum sign(w) sqrt|w| B_i: cross terms B_i A_j come in, so the error is large."""
    rank = max(part.factors.rank for part in parts)
    padded = [(part.factors.padded(rank), part.weight) for part in parts]
    # The sign goes to one side only: on both it would cancel, and a negative weight act as a positive one.
    a = sum((abs(w) ** 0.5 * f.a for f, w in padded), start=torch.zeros_like(padded[0][0].a))
    b = sum((abs(w) ** 0.5 * (1 if w >= 0 else -1) * f.b for f, w in padded), start=torch.zeros_like(padded[0][0].b))
    return Factors(a, b)


def ties(parts: Sequence[Part], settings: Settings) -> Factors:
    """Trim each change to its largest entries, elect a sign for each entry, average those that agree."""
    return _low_rank(_elect([_trim(p.factors.delta(), settings.density) for p in parts], parts), settings.rank)


def dare_ties(parts: Sequence[Part], settings: Settings) -> Factors:
    """Drop entries at random and rescale the rest, then elect signs as `ties` does."""
    return _low_rank(_elect([_drop(part, settings) for part in parts], parts), settings.rank)


METHODS: dict[str, Callable[[Sequence[Part], Settings], Factors]] = {
    "cat": cat,
    "svd": svd,
    "ties": ties,
    "dare_ties": dare_ties,
    "linear": linear,
}


def _trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    kept = max(1, int(density * delta.numel()))
    # The kept-th largest magnitude; ties with it stay, so that the result does not depend on their order.
    bound = delta.abs().flatten().kthvalue(delta.numel() - kept + 1).values
    return torch.where(delta.abs() >= bound, delta, 0.0)


def _drop(part: Part, settings: Settings) -> torch.Tensor:
    seed = hashlib.sha256(f"{settings.seed}:{part.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
    delta = part.factors.delta()
    kept = torch.rand(delta.shape, generator=generator) < settings.density
    return torch.where(kept, delta / settings.density, 0.0)


def _elect(deltas: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    weighted = torch.stack([delta * part.weight for delta, part in zip(deltas, parts, strict=True)])
    agrees = (weighted.sum(0).sign() * weighted.sign()) > 0
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _low_rank(delta: torch.Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return _split(u, s, vh, rank)


def _split(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> Factors:
    root = s[:rank].sqrt()
    return Factors((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())
