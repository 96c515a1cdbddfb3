"""The merging methods by themselves, for any ranks, shapes and weights, against sums that are multiplied out."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.merging.deltas import Factors
from adapterhub_lite.merging.methods import METHODS, Part, Settings
from adapterhub_lite.merging.receipts import relative_error

WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 0.05)


@st.composite
def some_parts(draw: st.DrawFn, most: int = 3) -> list[Part]:
    """One module of up to `most` adapters: (out, in) up to 12, ranks up to 5, weights of both signs."""
    out, width, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for index in range(draw(st.integers(1, most))):
        rank = draw(st.integers(1, 5))
        factors = Factors(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator))
        parts.append(Part(factors, draw(WEIGHTS), f"{index}"))
    return parts


def exact(parts: Sequence[Part]) -> torch.Tensor:
    """The weighted sum, multiplied out in fp64."""
    return torch.stack([part.weight * part.factors.delta(torch.float64) for part in parts]).sum(0)


def scale(parts: Sequence[Part]) -> float:
    """The size of what is summed up, over adapters and within their ranks: rounding goes by it even where it cancels."""
    sizes = [Factors(part.factors.a.abs(), part.factors.b.abs()).delta(torch.float64).norm() for part in parts]
    return sum(abs(part.weight) * float(size) for part, size in zip(parts, sizes, strict=True))


@pytest.mark.parametrize("method", ["cat", "svd"])
@settings(deadline=None)
@given(parts=some_parts())
def test_cat_and_svd_are_exact(method: str, parts: list[Part]) -> None:
    rank = sum(part.factors.rank for part in parts)
    merged = METHODS[method](parts, Settings(rank, 1.0, 0))
    assert merged.rank <= rank
    assert float((merged.delta(torch.float64) - exact(parts)).norm()) <= 1e-6 * scale(parts)


@settings(deadline=None)
@given(parts=some_parts(), rank=st.integers(1, 6))
def test_no_approximation_of_a_rank_is_nearer_than_svd(parts: list[Part], rank: int) -> None:
    merged = METHODS["svd"](parts, Settings(rank, 1.0, 0))
    lost = torch.linalg.svdvals(exact(parts))[rank:].square().sum().sqrt()
    found = (merged.delta(torch.float64) - exact(parts)).norm()
    assert float(found) <= float(lost) + 1e-6 * scale(parts)
    assert merged.rank <= rank


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@settings(deadline=None)
@given(parts=some_parts(most=1))
def test_one_adapter_is_its_weight_times_itself(method: str, parts: list[Part]) -> None:
    """Where PEFT 0.21 is wrong for negative weights (peft#3004): the sign has to survive."""
    merged = METHODS[method](parts, Settings(12, 1.0, 0))
    assert float((merged.delta(torch.float64) - exact(parts)).norm()) <= 1e-5 * scale(parts)


@settings(deadline=None)
@given(parts=some_parts(), seed=st.integers(0, 50))
def test_what_is_dropped_depends_on_seed_and_parent_alone(parts: list[Part], seed: int) -> None:
    def merged(order: Sequence[Part]) -> torch.Tensor:
        torch.manual_seed(len(order))  # whatever others draw
        return METHODS["dare_ties"](order, Settings(12, 0.5, seed)).delta(torch.float64)

    torch.testing.assert_close(merged(parts), merged(parts), rtol=0, atol=0)
    torch.testing.assert_close(merged(parts), merged(parts[::-1]), rtol=1e-5, atol=1e-5 * scale(parts))


@settings(deadline=None)
@given(parts=some_parts(), density=st.floats(0.05, 1.0))
def test_an_elected_entry_has_the_sign_of_the_sum_and_is_within_its_voters(parts: list[Part], density: float) -> None:
    found = METHODS["ties"](parts, Settings(12, density, 0)).delta(torch.float64)
    each = torch.stack([part.weight * part.factors.delta(torch.float64) for part in parts])
    slack = 1e-5 * scale(parts)
    assert bool((found <= each.clamp(min=0).amax(0) + slack).all())
    assert bool((found >= each.clamp(max=0).amin(0) - slack).all())


@settings(deadline=None)
@given(parts=some_parts(), rank=st.integers(1, 4))
def test_the_receipt_is_the_error_of_what_is_stored(parts: list[Part], rank: int) -> None:
    merged = METHODS["svd"](parts, Settings(rank, 1.0, 0))
    truth = exact(parts)
    if float(truth.norm()) < 1e-3 * scale(parts):
        return  # the weights nearly cancel: the ratio is all rounding
    said = relative_error({"m": merged}, [({"m": part.factors}, part.weight) for part in parts])
    assert said == pytest.approx(float((merged.delta(torch.float64) - truth).norm() / truth.norm()), rel=1e-6, abs=1e-9)
