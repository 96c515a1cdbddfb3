"""Rows laid end to end: each is answered as if it were alone, whatever its neighbours say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from adapterhub_lite.training.data.collation import PackedCollator, PaddedCollator, count_rows, learn_only_first
from adapterhub_lite.training.model import segments as module
from adapterhub_lite.training.model.segments import SEGMENTED, Segments, segment_inputs, segmented_attention

LENGTHS = [(5,), (3, 9, 1, 4), (7, 7, 7), (30, 2, 29, 17, 1)]


def inputs(lengths: tuple[int, ...], heads: int = 6, kv_heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    total = sum(lengths)
    return [torch.randn(1, count, total, 8, requires_grad=True) for count in (heads, kv_heads, kv_heads)]


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The reference: torch's attention, one sequence after another."""
    parts = [x.split(lengths, 2) for x in (query, key, value)]
    whole = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(whole, 2).transpose(1, 2)


@pytest.mark.parametrize("short_tokens", [512, 0], ids=["own kernel", "torch's kernel"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients_are_those_of_each_row_alone(
    lengths: tuple[int, ...], short_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORT_TOKENS", short_tokens)
    tensors = inputs(lengths)
    row = Segments(lengths, torch.device("cpu"))
    found, _ = segmented_attention(torch.nn.Module(), *tensors, None, segments=row)
    wanted = plain(*tensors, lengths)
    torch.testing.assert_close(found, wanted)
    outer = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, outer), torch.autograd.grad(wanted, tensors, outer), rtol=1e-4, atol=1e-5
    )


def test_groups_cover_every_token_once() -> None:
    row = Segments((30, 2, 29, 17, 1, 16), torch.device("cpu"))
    assert torch.cat([group.tokens for group in row.groups]).sort().values.tolist() == list(range(sum(row.lengths)))
    assert [(group.count, group.length) for group in row.groups] == [(2, 30), (2, 17), (1, 2), (1, 1)]


def test_segments_are_read_off_the_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert Segments.of(positions).lengths == (3, 1, 2)


def batch_of(rows: list[list[int]]) -> dict[str, Any]:
    return PackedCollator()([{"input_ids": row, "labels": row} for row in rows])


@pytest.fixture
def segmented(tiny_base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    model.set_attn_implementation(SEGMENTED)
    return model


def test_a_neighbours_tokens_change_nothing(segmented: Any) -> None:
    mine, one, other = [9, 8, 7, 6], [1, 2, 3], [200, 201, 202]

    def states(neighbour: list[int]) -> torch.Tensor:
        batch = batch_of([neighbour, mine])
        batch.pop("labels")
        hidden: torch.Tensor = segmented.model(**segment_inputs(batch))[0]
        return hidden[0, 3:]

    assert torch.equal(states(one), states(other))
    torch.testing.assert_close(states(one), segmented.model(input_ids=torch.tensor([mine]))[0][0])


def test_without_segments_it_is_transformers_own_attention(segmented: Any, tiny_base: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tokens = torch.tensor([[1, 2, 3, 4], [9, 9, 8, 7]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    torch.testing.assert_close(
        segmented(tokens, attention_mask=mask).logits[mask.bool()],
        reference(tokens, attention_mask=mask).logits[mask.bool()],
    )
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(segmented.generate(tokens, **settings), reference.generate(tokens, **settings))


def test_the_first_label_of_a_row_is_not_learned_from_the_row_before() -> None:
    batch = batch_of([[5, 6], [7, 8, 9]])
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]


def test_the_rows_beyond_a_number_can_be_left_unlearned() -> None:
    packed = batch_of([[5, 6], [7, 8, 9]])
    padded = PaddedCollator(0)([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([5, 6], [7, 8, 9])])
    assert count_rows(packed) == count_rows(padded) == 2
    assert learn_only_first(packed, 1)["labels"].tolist() == [[-100, 6, -100, -100, -100]]
    assert learn_only_first(padded, 1)["labels"].tolist() == [[-100, 6, -100], [-100] * 3]
    assert learn_only_first(packed, 2)["labels"].tolist() == packed["labels"].tolist()
