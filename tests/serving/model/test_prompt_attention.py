"""Prompts attended head by head, as an accelerator gets them: the same numbers, and no mask of heads x queries x keys."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalBias

from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.packed_step import RowSlice, pack


def attended(
    whole_heads: bool, heads: tuple[int, int], lengths: list[tuple[int, int]], window: int | None, softcap: float | None
) -> torch.Tensor:
    """What the last of two steps gives; `lengths` are (tokens before, tokens now) of each row."""
    kv_heads, group = heads
    draw = torch.Generator().manual_seed(1)
    cache = KVCache(2, len(lengths), whole_heads=whole_heads)
    before = [RowSlice(row, 0, [1] * past) for row, (past, _) in enumerate(lengths) if past]
    for slices in (before, [RowSlice(row, past, [1] * now) for row, (past, now) in enumerate(lengths)]):
        if not slices:
            continue
        step = pack(slices)
        cache.begin(step)
        query = torch.randn(len(step.token_ids), kv_heads * group, 16, generator=draw)
        key, value = (torch.randn(len(query), kv_heads, 16, generator=draw) for _ in range(2))
        # Two layers of one step, of which one has soft caps: each finds the mask that is its own.
        capped = cache.attend(0, query, key, value, None, window, softcap=softcap)
        out = torch.cat((capped, cache.attend(1, query, key, value, None, window)))
    return out


@settings(max_examples=60, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    lengths=st.lists(st.tuples(st.sampled_from([0, 0, 1, 9, 300]), st.integers(1, 12)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.just(3.0),
)
def test_by_heads_is_what_folded_heads_give(
    heads: tuple[int, int], lengths: list[tuple[int, int]], window: int | None, softcap: float | None
) -> None:
    torch.testing.assert_close(
        attended(True, heads, lengths, window, softcap), attended(False, heads, lengths, window, softcap)
    )


def test_neighbours_of_other_lengths_have_their_own_keys() -> None:
    lengths = [(30, 10), (30, 10), (45, 10), (7, 10)]
    torch.testing.assert_close(
        attended(True, (2, 4), lengths, None, None), attended(False, (2, 4), lengths, None, None)
    )


def test_no_mask_is_made_where_there_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.Tensor | None, bool, torch.Size]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
        asked.append((attn_mask, is_causal, q.shape))
        with pytest.MonkeyPatch.context() as unwatched:
            # The bias knows torch's function by its place.
            unwatched.setattr(torch.nn.functional, "scaled_dot_product_attention", own)
            return own(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    lengths = [(0, 40), (0, 40), (30, 10), (30, 10), (45, 10), (50, 1)]
    attended(True, (2, 4), lengths, None, None)
    begin = [entry for entry in asked if entry[2][2] == 40]
    assert begin and all(mask is None and causal for mask, causal, _ in begin)
    go_on = [(mask, shape[0]) for mask, _, shape in asked if shape[2] == 10]
    # Two rows of one length by one call, the longer one by another; what the mask would be is only said.
    assert [(type(mask), mask.seq_len_kv, rows) for mask, rows in go_on] == 2 * [
        (CausalBias, 40, 2),
        (CausalBias, 55, 1),
    ]
    masks = [mask for mask, _, _ in asked if mask is not None and not isinstance(mask, CausalBias)]
    assert {tuple(mask.shape[1:]) for mask in masks} == {(1, 1, 51)}, "only that of the row that decodes"
    asked.clear()
    attended(True, (2, 4), lengths, 20, None)
    masks = [mask for mask, _, _ in asked if mask is not None]
    # With a window: rows x queries x keys at most, one for all heads.
    assert masks and all(mask.shape[1] == 1 for mask in masks)
