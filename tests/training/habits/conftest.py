"""Two trainers of one run: transformers' own with a PEFT model, and ours, on the same weights and rows."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

# Habits are asked of two trainers each: minutes, all together.
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder is a slow one."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


def token_rows(count: int = 24, seed: int = 0) -> Dataset:
    """Rows of random tokens of uneven lengths that end with the end token; the first three of each are a prompt."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = [*torch.randint(5, 250, (6 + index % 7,), generator=draw).tolist(), 256]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "attention_mask": [1] * len(ids)})
    return Dataset.from_list(rows)


@dataclass
class Bench:
    """What both trainers are made from."""

    base: Path
    folder: Path
    tokenizer: Any

    def __post_init__(self) -> None:
        self.count = itertools.count()
        end = self.tokenizer.eos_token_id
        self.rows = token_rows().map(
            lambda row: {n: [end if i == 256 else i for i in row[n]] for n in ("input_ids", "labels")}
        )

    def model(self, seed: int = 42, **lora: Any) -> Any:
        """A fresh PEFT model in fp32, the same for the same seed."""
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        set_seed(seed)
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        )
        return get_peft_model(base, config)

    def run_folder(self) -> str:
        """A folder that no trainer had."""
        return str(self.folder / f"run-{next(self.count)}")

    def settings(self, **arguments: Any) -> dict[str, Any]:
        """Arguments that both understand."""
        common = {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
        }
        common |= {"report_to": "none", "logging_steps": 1, "use_cpu": True, "lr_scheduler_type": "linear"}
        common |= {"save_strategy": "no", "disable_tqdm": True, "warmup_steps": 0, "output_dir": self.run_folder()}
        return {**common, **arguments}

    def plain(self, rows: Any = None, model: Any = None, cls: type[Trainer] = Trainer, **given: Any) -> Trainer:
        """transformers' own, as a script writes it."""
        keywords = given.pop("keywords", {})
        keywords = {"data_collator": DataCollatorForSeq2Seq(self.tokenizer, padding=True), **keywords}
        return cls(
            model or self.model(),
            TrainingArguments(**self.settings(**given)),
            train_dataset=self.rows if rows is None else rows,
            processing_class=self.tokenizer,
            **keywords,
        )

    def ours(
        self, rows: Any = None, model: Any = None, cls: type[AdapterTrainer] = AdapterTrainer, **given: Any
    ) -> AdapterTrainer:
        """Ours: the same script with another class."""
        keywords = given.pop("keywords", {})
        args = AdapterTrainingArguments(**self.settings(**{"show_progress": False, "base_dtype": "float32", **given}))
        rows = self.rows if rows is None else rows
        return cls(model or self.model(), args, train_dataset=rows, processing_class=self.tokenizer, **keywords)


@pytest.fixture
def bench(tiny_base: Path, tmp_path: Path) -> Bench:
    """What both trainers of a test are made from."""
    return Bench(tiny_base, tmp_path, AutoTokenizer.from_pretrained(tiny_base))


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What was trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


Make = Callable[[Bench], dict[str, Any]]


def assert_same_run(one: Trainer, other: Trainer, tolerance: float = 1e-4) -> None:
    """Both trained the same: every loss, and every weight in the end."""
    for trainer in (one, other):
        # Each as in a process of its own: some samplers draw from torch's own generator.
        set_seed(trainer.args.seed)
        trainer.train()
    assert losses(other) == pytest.approx(losses(one), rel=tolerance), (losses(one), losses(other))
    wanted, found = weights(one), weights(other)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=tolerance)
