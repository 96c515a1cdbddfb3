"""A model that does more to its logits than its head says is trained on the logits it returns."""

from functools import wraps
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapterhub_lite.training.data.collation import PaddedCollator


class NewcomerConfig(LlamaConfig):
    model_type = "newcomer"


class Newcomer(LlamaForCausalLM):
    """Lowers the logits of the first half of its vocabulary, which no config says."""

    config_class = NewcomerConfig

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        output = super().forward(*inputs, **keywords)
        size = output.logits.shape[-1]
        output.logits = output.logits - 2.0 * (torch.arange(size) < size // 2)
        return output


@pytest.fixture
def newcomer(tiny_base: Any) -> Any:
    AutoConfig.register("newcomer", NewcomerConfig, exist_ok=True)
    AutoModelForCausalLM.register(NewcomerConfig, Newcomer, exist_ok=True)
    config = NewcomerConfig.from_pretrained(tiny_base)
    return Newcomer.from_pretrained(tiny_base, config=config, dtype=torch.float32)


def test_it_is_trained_and_evaluated_on_the_logits_it_returns(
    make_trainer: Any, newcomer: Any, byte_tokenizer: Any, rows: Any
) -> None:
    """`train` would stop at its own proof, were the loss not the model's."""
    keywords = {"processing_class": byte_tokenizer, "eval_dataset": rows[:5]}
    trainer = make_trainer(model=newcomer, keywords=keywords, label_smoothing_factor=0.1)
    assert trainer.assembly.loss.name == "model"
    batch = PaddedCollator(0)([trainer.eval_dataset[i] for i in range(5)])
    goals = batch.pop("labels")[:, 1:].flatten()
    logits = newcomer.eval()(**batch).logits[:, :-1].flatten(0, 1)
    truth = torch.nn.functional.cross_entropy(logits, goals)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth.item(), rel=1e-4)
    trainer.train()
    assert "differ from the model's own" in trainer.record().loss_backend["reason"]
