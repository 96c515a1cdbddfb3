"""The compiled attention against PyTorch's, through the cache: odd sizes, groups, windows, threads, numbers out of range."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.compiled.attention_native import MOST_QUERIES, NativeAttention
from adapterhub_lite.serving.model.compiled.library import row_attention
from adapterhub_lite.serving.model.packed_step import RowSlice, pack

# Not every one has only zeros beside the bits that make it one: these are those that a wrong exponential would add to.
ODD_NAN = struct.unpack("f", struct.pack("I", 0x7FC001FF))[0]
kernel = row_attention()
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")
Shape = tuple[int, int, int, int]  # kv_heads, heads that share each, key_dim, value_dim


def direct(threads: int = 1) -> NativeAttention:
    assert kernel is not None
    return NativeAttention(kernel, threads=threads)


def attended(
    made: NativeAttention | None, shape: Shape, lengths: list[tuple[int, int]], dtype: torch.dtype, *,
    window: int | None = None, spread: float = 1.0, poison: tuple[str, float] | None = None, wide: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What the last of two steps gives: `lengths` are (tokens before, tokens now) of each row.

    `wide` computes in float64 from numbers that were rounded to `dtype`.
    """
    kv_heads, group, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(3)
    cache = KVCache(1, len(lengths), direct=made)
    before = [RowSlice(row, 0, [1] * past) for row, (past, _) in enumerate(lengths) if past]
    for slices in (before, [RowSlice(row, past, [1] * now) for row, (past, now) in enumerate(lengths)]):
        if not slices:
            continue
        step = pack(slices)
        tokens = len(step.token_ids)
        # As the fused pass has them: queries and keys side by side, so that neither is contiguous.
        both = torch.randn(tokens, kv_heads * (group + 1), key_dim, generator=generator) * spread
        value = torch.randn(tokens, kv_heads, value_dim, generator=generator)
        if poison is not None:
            (value[0] if poison[0] == "value" else both[0, kv_heads * group :]).fill_(poison[1])
        both, value = both.to(dtype), value.to(dtype)
        if wide:
            both, value = both.double(), value.double()
        cache.begin(step)
        heads = kv_heads * group
        out = cache.attend(0, both[:, :heads], both[:, heads:], value, None, window)
    return out


LENGTHS = [(0, 1), (15, 1), (16, 1), (33, 1), (250, 2), (3, MOST_QUERIES), (7, MOST_QUERIES + 1)]


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 3, 64, 64), (2, 4, 16, 48), (1, 9, 37, 19), (2, 7, 80, 96)])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_gives_what_pytorch_gives(shape: Shape, window: int | None, threads: int) -> None:
    got = attended(direct(threads), shape, LENGTHS, torch.float32, window=window)
    torch.testing.assert_close(got, attended(None, shape, LENGTHS, torch.float32, window=window))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 70), st.integers(1, 70)),
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 10)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 70),
    spread=st.sampled_from([0.0, 1.0]),
)
def test_for_any_sizes(shape: Shape, lengths: list[tuple[int, int]], window: int | None, spread: float) -> None:
    got = attended(direct(), shape, lengths, torch.float32, window=window, spread=spread)
    want = attended(None, shape, lengths, torch.float32, window=window, spread=spread)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_bfloat16_is_no_further_from_the_truth_than_pytorch(spread: float) -> None:
    shape, lengths = (3, 3, 64, 64), [(200, 1), (17, 1), (90, 3)]
    rounded = [attended(made, shape, lengths, torch.bfloat16, spread=spread) for made in (direct(2), None)]
    truth = attended(None, shape, lengths, torch.bfloat16, spread=spread, wide=True)
    ours, theirs = ((one.double() - truth).abs().max().item() for one in rounded)
    assert ours <= theirs * 1.05 + 1e-6, f"ours {ours}, PyTorch's {theirs}"


@pytest.mark.parametrize("poison", [("value", math.nan), ("value", math.inf), ("key", math.nan), ("key", ODD_NAN)])
@pytest.mark.parametrize("past", [0, 5, 40])
def test_what_is_not_finite_comes_through_in_its_row_and_in_no_other(poison: tuple[str, float], past: int) -> None:
    """The engine ends a request by its logits that are not finite: an attention that hid them would answer rubbish."""
    shape, lengths = (2, 2, 8, 8), [(past, 1), (past, 1)]
    got = attended(direct(), shape, lengths, torch.float32, poison=poison)
    assert not got[0].isfinite().any()
    torch.testing.assert_close(got[1], attended(direct(), shape, lengths, torch.float32)[1])


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    shape, lengths = (1, 2, 16, 16), [(100, 1)]
    got = attended(direct(), shape, lengths, torch.float32, spread=1e4)
    torch.testing.assert_close(got, attended(None, shape, lengths, torch.float32, spread=1e4))
