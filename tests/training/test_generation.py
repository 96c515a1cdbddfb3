"""Metrics on generated text: answers of the model in training, judged as they come, logged with the evaluation."""

from typing import Any

import torch

from adapterhub_lite.training import GeneratedMetrics, generate_answers


def test_answers_do_not_depend_on_the_batch_and_the_mode_is_left_alone(make_trainer: Any, rows: Any) -> None:
    trainer = make_trainer()
    trainer.model.train()
    chats = [row["messages"][:1] for row in rows[:5]]
    together = generate_answers(trainer.model, trainer.processing_class, chats, 6)
    alone = [generate_answers(trainer.model, trainer.processing_class, [chat], 6)[0] for chat in chats]
    assert together == alone and len(together) == 5
    assert trainer.model.training


def test_exact_match_and_own_metrics_are_logged_after_each_evaluation(make_trainer: Any, rows: Any) -> None:
    seen = []

    def length(wanted: str, found: str) -> float:
        seen.append((wanted, found))
        return float(len(wanted))

    metrics = GeneratedMetrics(rows[:5], {"length": length}, max_new_tokens=3)
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=2, keywords={"eval_dataset": rows[:5], "callbacks": [metrics]}
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_exact_match" in line]
    assert [line["step"] for line in logged] == [2, 4] and len(seen) == 10
    assert logged[0]["eval_length"] == sum(len(row["messages"][1]["content"]) for row in rows[:5]) / 5
    assert torch.is_grad_enabled()
