"""The trainer as a whole, on a tiny base: it learns, it saves plain PEFT, it says what it did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterhub_lite.record import read_record


def test_training_lowers_the_loss_and_leaves_metrics_and_a_plot(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=12, learning_rate=2e-2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0] * 0.8
    assert all(line["tokens"] > 0 and line["peak_bytes"] > 0 for line in lines)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_adapter_is_plain_peft_with_a_record_and_no_tokenizer(
    make_trainer: Any, tmp_path: Path, tiny_base: Path
) -> None:
    from peft import PeftModel

    trainer = make_trainer()
    trainer.train()
    folder = trainer.save_adapter(tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_record.json",
    ]
    tokens = torch.tensor([[1, 2, 3, 4]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder).eval()
    trained = trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, trained(tokens).logits)
    record = read_record(folder)
    assert record is not None and record.steps == 4 and record.data.rows == 40
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_is_the_models_own(make_trainer: Any, chunk: int | None) -> None:
    trainer = make_trainer(loss_chunk_tokens=chunk)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(ours, trainer.model(**batch).loss)
