"""Evaluation without logits: loss, accuracy and entropy are those of the logits, over tokens and not over batches."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from adapterhub_lite.training.data.collation import PaddedCollator


def reference(trainer: Any, table: Any) -> dict[str, float]:
    batch = PaddedCollator(0)([table[i] for i in range(len(table))])
    goals = batch.pop("labels")[:, 1:].flatten()
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits[:, :-1].flatten(0, 1)[goals != -100]
    goals = goals[goals != -100]
    share = logits.softmax(-1)
    return {
        "eval_loss": F.cross_entropy(logits, goals).item(),
        "eval_token_accuracy": (logits.argmax(-1) == goals).float().mean().item(),
        "eval_entropy": -(share * share.log()).sum(-1).mean().item(),
        "eval_tokens": float(len(goals)),
    }


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_sums_are_those_of_the_logits(make_trainer: Any, rows: Any, padding_free: bool, size: int) -> None:
    trainer = make_trainer(
        per_device_eval_batch_size=size, padding_free=padding_free, keywords={"eval_dataset": rows[:7]}
    )
    found = trainer.evaluate()
    wanted = reference(trainer, trainer.eval_dataset)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_several_evaluation_sets_have_a_prefix_each(make_trainer: Any, rows: Any) -> None:
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, keywords={"eval_dataset": {"near": rows[:3], "far": rows[3:6]}}
    )
    trainer.train()
    logged = {key for line in trainer.state.log_history for key in line}
    assert {"eval_near_loss", "eval_far_loss", "eval_far_token_accuracy"} <= logged


def test_compute_metrics_gets_predictions_for_every_row(make_trainer: Any, rows: Any) -> None:
    def accuracy(predicted: Any) -> dict[str, float]:
        goals = predicted.label_ids[:, 1:]
        valid = goals != -100
        assert predicted.predictions.shape == (7, predicted.label_ids.shape[1] - 1)
        return {"own": float((predicted.predictions == goals)[valid].mean())}

    trainer = make_trainer(
        per_device_eval_batch_size=3,
        keywords={
            "eval_dataset": rows[:7],
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits[:, :-1].argmax(-1),
        },
    )
    found = trainer.evaluate()
    assert found["eval_own"] == pytest.approx(found["eval_token_accuracy"])
