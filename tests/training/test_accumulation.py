"""The same tokens give the same gradient, however they are cut into batches, with or without padding."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.training.data.collation import PackedCollator, PaddedCollator


def gradient(trainer: Any, rows: list[dict[str, Any]], size: int, collator: Any) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over `rows`, as `training_step` makes it in batches of `size`."""
    return gradient_of(trainer, [rows[start : start + size] for start in range(0, len(rows), size)], collator)


def gradient_of(trainer: Any, parts: list[list[dict[str, Any]]], collator: Any) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over batches that hold `parts`."""
    trainer.model.zero_grad()
    batches = [collator(part) for part in parts]
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.training_step(trainer.model, batch, count)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def trainer(make_trainer: Any) -> Any:
    made = make_trainer(gradient_accumulation_steps=4)
    made.optimizer = None
    torch.manual_seed(0)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_one_by_eight_two_by_four_and_eight_by_one_are_one_gradient(trainer: Any, packed: bool) -> None:
    collator = PackedCollator() if packed else PaddedCollator(0)
    # Uneven lengths and masks: a mean of means would be another number.
    rows = [trainer.train_dataset[i] for i in range(8)]
    assert len({row["length"] for row in rows}) > 2
    wanted = gradient(trainer, rows, 8, PaddedCollator(0))
    for size in (1, 2, 4, 8):
        torch.testing.assert_close(gradient(trainer, rows, size, collator), wanted, rtol=1e-4, atol=1e-6)


@st.composite
def rows_and_cuts(draw: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """Up to six rows of 2 to 9 tokens, some learned and some not, and where to cut them into batches."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 255), min_size=2, max_size=9))
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append({"input_ids": ids, "labels": [one if yes else -100 for one, yes in zip(ids, learned, strict=True)]})
    return rows, sorted(draw(st.sets(st.integers(1, len(rows)))) | {0, len(rows)})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_and_cuts())
def test_any_cut_of_any_rows_is_one_gradient(trainer: Any, drawn: tuple[list[dict[str, Any]], list[int]]) -> None:
    rows, cuts = drawn
    wanted = gradient(trainer, rows, len(rows), PaddedCollator(0))
    parts = [rows[start:end] for start, end in itertools.pairwise(cuts)]
    torch.testing.assert_close(gradient_of(trainer, parts, PackedCollator()), wanted, rtol=1e-4, atol=1e-6)


def test_it_is_the_gradient_of_the_mean_over_tokens(trainer: Any) -> None:
    rows = [trainer.train_dataset[i] for i in range(8)]
    found = gradient(trainer, rows, 2, PackedCollator())
    trainer.model.zero_grad()
    trainer.model(**PaddedCollator(0)(rows)).loss.backward()
    wanted = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_has_a_zero_loss_with_a_gradient(trainer: Any) -> None:
    batch = PackedCollator()([{"input_ids": [1, 2, 3], "labels": [-100] * 3}])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0 and torch.isfinite(loss)
