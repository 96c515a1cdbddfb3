"""A head is read from the model as it is when the loss is asked for."""

from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapterhub_lite.losses import causal_lm_loss, head_of


def test_tied_head_gives_the_models_own_loss(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.randint(0, 256, (3, 17))
    labels = ids.clone()
    labels[:, :5] = -100
    own = model(input_ids=ids, labels=labels).loss
    hidden = model.model(input_ids=ids).last_hidden_state
    loss = causal_lm_loss(head_of(model), hidden, labels, reduction="mean")
    torch.testing.assert_close(loss, own)


def test_plain_head_gives_the_models_own_loss() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 50, (2, 9))
    hidden = model.model(input_ids=ids).last_hidden_state
    loss = causal_lm_loss(head_of(model), hidden, ids, shift=False, reduction="mean")
    truth = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(loss, truth)
