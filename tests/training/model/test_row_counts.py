"""With 16-bit weights on a CPU, products are asked for few numbers of rows: each new one leaves code in memory."""

from typing import Any

import pytest
import torch

from adapterhub_lite.memory import Workload, facts_of
from adapterhub_lite.memory.estimate import traced_step
from adapterhub_lite.memory.presets import find_preset
from adapterhub_lite.memory.stand_ins import rounded_tokens
from adapterhub_lite.training.data.collation import PaddedCollator
from adapterhub_lite.training.run.step_loss import per_row


def batch(trainer: Any, lengths: list[int], collator: Any = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [{"input_ids": torch.randint(3, 250, (length,), generator=generator)} for length in lengths]
    made = (collator or trainer.data_collator)(rows)
    return {name: value.to(trainer.model.device) for name, value in made.items()}


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def trainer(make_trainer: Any, request: Any) -> Any:
    made = make_trainer(memory_preset="lora-bf16", lora_dropout=0.0, padding_free=request.param)
    assert made.assembly.packing.packs == request.param
    return made


def numbers_of_rows(trainer: Any) -> set[int]:
    """How many rows the products of attention are asked for, from now on."""
    met: set[int] = set()
    for name, module in trainer.model.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(lambda _, inputs, out: met.add(out.shape[:-1].numel()))
    return met


def test_batches_of_any_length_have_few_numbers_of_rows(trainer: Any) -> None:
    met = numbers_of_rows(trainer)
    for last in range(1, 60):
        trainer.compute_loss(trainer.model, batch(trainer, [20, 30, last]))
    assert 1 < len(met) <= 7


def test_a_loss_of_the_users_own_gets_few_numbers_of_rows_too(make_trainer: Any) -> None:
    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert outputs.logits.shape[:2] == labels.shape
        return outputs.logits.float().logsumexp(-1)[labels != -100].sum()

    trainer = make_trainer(memory_preset="lora-bf16", keywords={"compute_loss_func": own})
    met = numbers_of_rows(trainer)
    for last in range(1, 60):
        trainer.compute_loss(trainer.model, batch(trainer, [20, 30, last]))
    assert 1 < len(met) <= 7


def test_losses_by_row_are_those_of_the_rows(trainer: Any) -> None:
    given = batch(trainer, [21, 30, 8])
    trainer.compute_loss_func = per_row(lambda rows, items: rows.sums / rows.counts)
    found = []
    for rounds in (True, False):
        trainer.step_loss._rounds = rounds
        rows, _ = trainer.step_loss.by_row(trainer.model, dict(given))
        found.append(rows)
    assert found[0].counts.tolist() == found[1].counts.tolist() == [20, 29, 7]
    torch.testing.assert_close(found[0].sums, found[1].sums, rtol=5e-3, atol=0)


def test_the_filler_changes_neither_loss_nor_gradients_nor_what_is_returned(trainer: Any) -> None:
    given = batch(trainer, [21, 30, 8])
    found = []
    for rounds in (True, False):
        trainer.step_loss._rounds = rounds
        trainer.model.zero_grad()
        loss, outputs = trainer.compute_loss(trainer.model, dict(given), return_outputs=True)
        loss.backward()
        gradients = [p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None]
        found.append((loss.detach(), outputs.logits, torch.cat(gradients)))
    (loss, logits, gradient), (plain, plain_logits, plain_gradient) = found
    assert logits.shape == plain_logits.shape == (*given["input_ids"].shape, logits.shape[-1])
    torch.testing.assert_close(loss, plain, rtol=2e-3, atol=0)
    assert (gradient - plain_gradient).norm() <= 2e-2 * plain_gradient.norm()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 256, 257, 1024, 1025, 5000])
def test_what_is_added_is_little(tokens: int, rows: int) -> None:
    assert tokens <= rounded_tokens(tokens, rows)
    assert rounded_tokens(tokens, rows) < max(tokens + 16, 1.13 * tokens)


def test_the_plan_counts_the_filler(trainer: Any) -> None:
    preset, facts = find_preset("lora-bf16"), facts_of(trainer.base)
    assert traced_step(preset, Workload(3, 32, rank=4)).sequence_length == rounded_tokens(32, 3) == 32
    assert facts.step(preset, Workload(3, 33, rank=4)) == facts.step(preset, Workload(3, 40, rank=4))


def test_nothing_is_added_in_fp32_and_where_noise_depends_on_the_length(make_trainer: Any) -> None:
    assert not make_trainer("wide", memory_preset="lora-fp32").step_loss._rounds
    assert not make_trainer("noisy", memory_preset="lora-bf16", neftune_noise_alpha=5.0).step_loss._rounds


def test_the_users_own_multiple_counts() -> None:
    rows = [{"input_ids": [5] * 17}] * 4
    assert PaddedCollator(0, 8, rounds=True)(rows)["input_ids"].shape == (4, 24)
    assert PaddedCollator(0, rounds=True)(rows)["input_ids"].shape == (4, rounded_tokens(17, 4))
