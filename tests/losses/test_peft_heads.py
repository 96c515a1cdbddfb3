"""Heads under PEFT: what the model would compute and train, the logits-free loss computes and trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub_lite.losses import causal_lm_loss, choose_loss, head_of


def wrap(tiny_base: Path, *, name: str = "default", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """The tiny base, untied where the head is to change, with an adapter whose B is random."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=False, dtype=dtype)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(272, 32).to(dtype) * 0.2)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings), adapter_name=name)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def own_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of everything trained, through the model's own logits."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **_gradients(model)}


def our_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same through the logits-free loss; `model.get_base_model().model` is the trunk."""
    model.zero_grad()
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
    loss = causal_lm_loss(head_of(model), hidden, ids, reduction="mean")
    loss.backward()
    return {"loss": loss.detach(), **_gradients(model)}


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_trained_alike(model: Any, *expected: str) -> None:
    ids = torch.randint(0, 256, (2, 11))
    own, ours = own_gradients(model, ids), our_gradients(model, ids)
    assert own.keys() == ours.keys()
    for part in expected:
        assert any(part in name and bool(value.any()) for name, value in ours.items()), f"{part} is not trained"
    for name, value in own.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["default", "sql"])
def test_modules_to_save_under_any_name(tiny_base: Path, name: str) -> None:
    model = wrap(tiny_base, name=name, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save[name].weight.add_(0.1)
    assert_trained_alike(model, f"lm_head.modules_to_save.{name}")


@pytest.mark.parametrize("name", ["default", "sql"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_the_head_is_trained(tiny_base: Path, name: str, rslora: bool) -> None:
    model = wrap(tiny_base, name=name, target_modules=["q_proj", "lm_head"], use_rslora=rslora)
    choice = choose_loss(model, tokens=10**6)
    assert choice.name == "tiled" and "LoRA" in choice.reason
    assert_trained_alike(model, "lm_head.lora_A", "lm_head.lora_B")


def test_lora_dropout_on_the_head_is_drawn_once_per_token(tiny_base: Path) -> None:
    model = wrap(tiny_base, target_modules=["lm_head"], lora_dropout=0.5).train()
    ids = torch.randint(0, 256, (2, 11))
    first, second = our_gradients(model, ids)["loss"], our_gradients(model, ids)["loss"]
    assert first != second
    model.eval()
    assert_trained_alike(model, "lm_head.lora_B")


def test_two_adapters_and_a_switch_are_seen_at_call_time(tiny_base: Path) -> None:
    model = wrap(tiny_base, name="one", target_modules=["lm_head"])
    model.add_adapter("two", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    head = head_of(model)
    assert [pair.up_weight.shape[1] for pair in head.low_rank()] == [4]
    model.set_adapter("two")
    assert [pair.up_weight.shape[1] for pair in head.low_rank()] == [2]
    assert_trained_alike(model, "lm_head.lora_B.two")
    model.base_model.set_adapter(["one", "two"])
    assert_trained_alike(model, "lm_head.lora_B.one", "lm_head.lora_B.two")
    with model.disable_adapter():
        assert head_of(model).low_rank() == ()


def test_a_merged_head_is_read_as_merged(tiny_base: Path) -> None:
    model = wrap(tiny_base, target_modules=["lm_head"]).eval()
    ids = torch.randint(0, 256, (1, 9))
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state
    before = causal_lm_loss(head_of(model), hidden, ids)
    model.merge_adapter()
    torch.testing.assert_close(causal_lm_loss(head_of(model), hidden, ids), before)


def test_dora_on_the_head_takes_the_models_own(tiny_base: Path) -> None:
    model = wrap(tiny_base, target_modules=["q_proj", "lm_head"], use_dora=True)
    choice = choose_loss(model, tokens=10**6)
    assert choice.name == "full" and "DoRA" in choice.reason
    assert_trained_alike(model, "lm_head.lora_B", "lm_head.lora_magnitude_vector")


@pytest.mark.parametrize("rows", [[3, 5], {"embed_tokens": [3, 5], "lm_head": [271, 7, 5]}, list(range(40))])
def test_rows_of_tokens_on_the_head_are_trained(tiny_base: Path, rows: Any) -> None:
    """Of a tied head with the embedding, of another by themselves; of more than a row has numbers by the head's module."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=isinstance(rows, list))
    if isinstance(rows, dict):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(272, 32) * 0.2)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    choice = choose_loss(model, tokens=10**6)
    assert (choice.name, "rows of tokens" in choice.reason) == ("full" if len(rows) == 40 else "tiled", True)
    assert_trained_alike(model, "trainable_tokens_delta")
    with model.disable_adapter():
        assert not head_of(model).widens


def test_rows_of_tokens_on_a_head_with_a_bias_take_the_models_own(tiny_base: Path) -> None:
    """Which PEFT computes without that bias."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 272)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    choice = choose_loss(model, tokens=10**6)
    assert choice.name == "full" and "bias" in choice.reason
    assert_trained_alike(model, "trainable_tokens_delta")


def test_bf16_base_with_an_fp32_adapter_on_the_head(tiny_base: Path) -> None:
    model = wrap(tiny_base, target_modules=["lm_head"], dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (2, 11))
    own, ours = own_gradients(model, ids), our_gradients(model, ids)
    torch.testing.assert_close(ours["loss"], own["loss"], atol=0.02, rtol=0.01)
    for name, value in own.items():
        if name != "loss":
            apart = float((ours[name] - value).norm() / value.norm())
            assert ours[name].dtype == torch.float32 and apart < 0.03, f"{name}: {apart}"
