"""Rows and trainers for the tiny base."""

from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def chat(question: str, answer: str) -> dict[str, Any]:
    """One row: a question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Forty chats of uneven lengths: say the letter as often as asked."""
    return [chat(f"{LETTERS[i % 26]} times {i % 7 + 1}", LETTERS[i % 26] * (i % 7 + 1)) for i in range(40)]


@pytest.fixture
def make_trainer(tiny_base: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> Any:
    """A function (**arguments) -> AdapterTrainer on the tiny base; `train_dataset` and other keywords may be given."""

    def make(
        folder: str = "run",
        model: Any = None,
        train_dataset: Any = None,
        keywords: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> AdapterTrainer:
        settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "rank": 4, "alpha": 8}
        # In fp32, where equal is equal.
        settings |= {"show_progress": False, "use_cpu": True, "save_strategy": "no", "memory_preset": "lora-fp32"}
        settings |= arguments
        args = AdapterTrainingArguments(output_dir=str(tmp_path / folder), **settings)
        data = rows if train_dataset is None else train_dataset
        return AdapterTrainer(model or tiny_base, args, data, **(keywords or {}))

    return make
