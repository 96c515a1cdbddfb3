"""Metrics on generated text: answers of the model in training, judged as they come, part of each evaluation."""

import json
from pathlib import Path
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


def test_exact_match_and_own_metrics_are_part_of_each_evaluation(make_trainer: Any, rows: Any, tmp_path: Path) -> None:
    seen = []

    def length(wanted: str, found: str) -> float:
        seen.append((wanted, found))
        return float(len(wanted))

    metrics = GeneratedMetrics(rows[:5], {"length": length}, max_new_tokens=3)
    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_length",
        keywords={"eval_dataset": rows[:5], "generated_metrics": metrics},
    )
    trainer.train()
    wanted = sum(len(row["messages"][1]["content"]) for row in rows[:5]) / 5
    logged = [line for line in trainer.state.log_history if "eval_exact_match" in line]
    assert [line["step"] for line in logged] == [2, 4] and len(seen) == 10
    # With the loss in one line, where every reporter and the choice of the best checkpoint find it.
    assert all(line["eval_length"] == wanted and line["eval_loss"] > 0 for line in logged)
    assert trainer.state.best_metric == wanted
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept if line.get("eval_length") == wanted] == [2, 4]
    assert "test_exact_match" in trainer.predict(trainer.eval_dataset).metrics
    assert torch.is_grad_enabled()
