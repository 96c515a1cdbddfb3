"""Soft cap and scale are read from each family's config: our loss is the model's own, gradients too."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses import causal_lm_loss, choose_loss, head_mismatch, head_of, lm_loss_of_logits
from adapterhub_lite.losses.heads import KNOWN_FAMILIES

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "hyperclovax": {"logits_scaling": 0.125},
    "falcon_h1": {
        "lm_head_multiplier": 0.0625, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
        "mamba_d_state": 8, "mamba_chunk_size": 8,
    },
    "minicpm3": {
        "dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip


def tiny_model(family: str) -> Any:
    """A random model of the family, its head noisy enough that a wrong scale or cap is seen."""
    settings = {**SMALL, **SPECIAL.get(family, {})}
    if family == "gpt2":
        settings = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4}
    if family in ("falcon_h1", "minicpm3"):
        settings.pop("head_dim")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    return model


@pytest.mark.parametrize("family", sorted(KNOWN_FAMILIES))
def test_loss_is_the_models_own(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 99, (2, 12))
    head = head_of(model)
    assert head.family == family
    assert head_mismatch(model, head) is None
    own = model(input_ids=ids, labels=ids, use_cache=False).loss
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(causal_lm_loss(head, hidden, ids, reduction="mean"), own)


class _Doubling(nn.Linear):
    """A head that is not the linear map it looks like."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_a_head_that_computes_something_else_goes_to_the_full_loss() -> None:
    model = tiny_model("llama")
    model.set_output_embeddings(_Doubling(32, 99, bias=False))
    ids = torch.randint(3, 99, (2, 12))
    choice = choose_loss(model, tokens=10**6)
    assert choice.name == "full" and "_Doubling" in choice.reason
    hidden = model.base_model(input_ids=ids).last_hidden_state
    loss = causal_lm_loss(head_of(model), hidden, ids, reduction="mean", choice=choice)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_an_unknown_family_that_scales_its_logits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("granite")
    model.config.model_type = "newcomer"
    assert choose_loss(model, tokens=10**6).name == "tiled"
    model.config.logits_scaling = 3.0
    head = head_of(model)
    model.config.logits_scaling = 8.0
    choice = choose_loss(model, tokens=10**6, head=head)
    assert choice.name == "model" and "differ from the model's own" in choice.reason
    for name in ("full", "tiled"):
        with pytest.raises(ConfigurationError, match="differ from the model's own"):
            choose_loss(model, tokens=16, prefer=name, head=head)
    hidden, ids = torch.randn(1, 4, 32), torch.arange(4)[None]
    with pytest.raises(ConfigurationError, match="own logits"):
        causal_lm_loss(head, hidden, ids, choice=choice)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "dora"])
def test_an_unknown_family_is_compared_whatever_its_head_is(wrapped: bool) -> None:
    """What tiles cannot read is still called for its logits, and these may lack what the model does to them."""
    model = tiny_model("granite")
    if wrapped:
        lora = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    inner = model.get_base_model() if wrapped else model
    inner.config.model_type, scale = "newcomer", inner.config.logits_scaling
    assert choose_loss(model, tokens=10**6).name == ("full" if wrapped else "tiled")
    inner.config.logits_scaling = 1.0
    head = head_of(model)
    inner.config.logits_scaling = scale
    assert choose_loss(model, tokens=10**6, head=head).name == "model"


@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_of_a_models_own_logits(shift: bool) -> None:
    model = tiny_model("granite")
    ids = torch.randint(3, 99, (2, 12))
    labels = ids.masked_fill(torch.rand(2, 12) < 0.4, -100)
    options = {"shift": shift, "reduction": "mean", "label_smoothing": 0.1, "token_weights": torch.rand(2, 12)}
    hidden = model.base_model(input_ids=ids).last_hidden_state
    truth = causal_lm_loss(head_of(model), hidden, labels, **options)
    torch.testing.assert_close(lm_loss_of_logits(model(input_ids=ids).logits, labels, **options), truth)
