"""The same tokens give the same gradient, however they are cut into batches, with or without padding."""

from typing import Any

import pytest
import torch

from adapterhub_lite.training.collation import PackedCollator, PaddedCollator


def gradient(trainer: Any, rows: list[dict[str, Any]], size: int, collator: Any) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over `rows`, as `training_step` makes it in batches of `size`."""
    trainer.model.zero_grad()
    batches = [collator(rows[start : start + size]) for start in range(0, len(rows), size)]
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
