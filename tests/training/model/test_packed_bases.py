"""Bases whose weights bitsandbytes has packed, of families whose own code touches weights in training."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from adapterhub_lite import AdapterTrainer, AdapterTrainingArguments
from tests.serving.model.families import build


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("preset", ["lora-int8", "qlora-nf4"])
def test_a_base_that_clamps_its_weights_in_training_is_trained_packed(
    preset: str, tmp_path: Path, byte_tokenizer: Any
) -> None:
    base = build("gemma3n_text", tmp_path / "base", byte_tokenizer)
    args = AdapterTrainingArguments(
        output_dir=str(tmp_path / "run"), memory_preset=preset, max_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-3, report_to="none", save_strategy="no", show_progress=False, use_cpu=True,
    )  # fmt: skip
    ids = [*range(40, 60), byte_tokenizer.eos_token_id]
    trainer = AdapterTrainer(str(base), args, Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4))
    trainer.train()
    pairs = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    # Nothing is clamped, so that nothing is only read.
    assert pairs and all(bool(pair.any()) for pair in pairs)
