"""The compiled products of a low-rank adapter against the same products in float64."""

import pytest
import torch
from torch import Tensor

from adapterhub_lite.memory.stand_ins import MOST_COMPILED_RANK
from adapterhub_lite.training.model.low_rank import LowRank, low_rank_for


@pytest.fixture(scope="module")
def compiled() -> LowRank:
    found = low_rank_for(torch.empty(1, 1, dtype=torch.bfloat16), 8)
    if found is None:
        pytest.skip("no C compiler")
    return found


def operands(tokens: int, n: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, n) in bf16, the matrix (rank, n) and what stands to its left (tokens, rank)."""
    generator = torch.Generator().manual_seed(tokens * n + rank)
    x = torch.randn(tokens, n, generator=generator).bfloat16()
    return x, torch.randn(rank, n, generator=generator), torch.randn(tokens, rank, generator=generator)


# Below, at and beyond what the C code takes at a time: 2 and 4 tokens, 16 and 32 columns, 8 ranks.
SIZES = [(1, 1, 1), (5, 33, 3), (7, 576, 8), (64, 47, 12), (130, 100, 16), (3, 31, 32)]


@pytest.mark.parametrize(("tokens", "n", "rank"), SIZES)
def test_they_are_the_plain_products(compiled: LowRank, tokens: int, n: int, rank: int) -> None:
    x, matrix, left = operands(tokens, n, rank)
    wide = x.double()
    torch.testing.assert_close(
        compiled.reduce(x, matrix, 0.5), (0.5 * wide @ matrix.t().double()).float(), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        compiled.gradient(x, left, 0.5), (0.5 * left.t().double() @ wide).float(), atol=1e-4, rtol=1e-5
    )
    wanted = wide + 0.5 * left.double() @ matrix.double()
    found = x.clone()
    compiled.update(found, matrix, left, 0.5)
    # Rounded once, to 8 bits, beside what fp32 sums may be off by.
    assert bool(((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all())


def test_what_lies_between_two_numbers_becomes_the_even_one(compiled: LowRank) -> None:
    x = torch.linspace(-4, 4, 21 * 7).bfloat16().reshape(7, 21)
    # Half of the distance to the next number, and three halves: the sums are exact.
    half = torch.exp2(torch.frexp(x.float()).exponent - 9.0)
    for halves in (1.0, -1.0, 3.0, -3.0):
        for row in range(len(x)):
            found = x[row : row + 1].clone()
            compiled.update(found, halves * half[row : row + 1], torch.ones(1, 1))
            assert torch.equal(found, (x[row : row + 1].float() + halves * half[row : row + 1]).bfloat16())


def test_what_is_not_finite_stays_so(compiled: LowRank) -> None:
    x, matrix, left = operands(4, 20, 8)
    x[0, 0], x[1, 19], x[2, 3] = float("nan"), float("nan"), float("inf")
    compiled.update(x, matrix, left)
    assert x[0, 0].isnan() and x[1, 19].isnan() and x[2, 3].isposinf() and x[3].isfinite().all()


def test_only_what_it_can_take_is_taken() -> None:
    x = torch.empty(2, 4)
    assert low_rank_for(x, 8) is None and low_rank_for(x.half(), 8) is None
    assert low_rank_for(x.bfloat16(), MOST_COMPILED_RANK + 1) is None
    assert low_rank_for(x.bfloat16().to("meta"), 8) is None
