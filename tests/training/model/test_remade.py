"""What is made again in the backward pass instead of kept: the same bits, less memory, and not where it is no longer true."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterhub_lite.memory.tracing import LiveBytes
from adapterhub_lite.training.model import fast_lora, lean_blocks
from adapterhub_lite.training.model.remade import recipe_of, remember
from tests.training.model.test_lean_families import build, end_to_end, lean

FAMILIES = ["llama", "qwen3", "gemma3_text", "granite", "phi3"]


def kept(model: Any) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and the bytes of activations at its worst moment."""
    live = LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        found = end_to_end(model)
    return found, live.peak


def bits_are_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_has_the_same_bits_and_takes_less(
    family: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(lean_blocks, "lean_blocks", lambda: None)
    model = build(family, dtype)
    with lean(model):
        found, peak = kept(model)
        monkeypatch.setattr(fast_lora, "recipe_of", lambda x: None)
        wanted, before = kept(model)
    assert bits_are_equal(found, wanted)
    assert peak < 0.9 * before


@pytest.mark.parametrize("reentrant", [True, False])
def test_beside_gradient_checkpointing_too(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)
    with lean(model):
        wanted = end_to_end(model)
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found, peak = kept(model)
        monkeypatch.setattr(fast_lora, "recipe_of", lambda x: None)
        _, before = kept(model)
    assert bits_are_equal(found, wanted)
    assert peak <= before


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm"])
def test_what_was_written_to_since_is_kept(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(_module: Any, _inputs: Any, made: Tensor) -> None:
        with torch.no_grad():
            made.mul_(2)

    model = build("llama", torch.float32)
    with lean(model):
        for name, module in model.named_modules():
            if name.endswith(part):
                module.register_forward_hook(double)
        found = end_to_end(model)
        monkeypatch.setattr(fast_lora, "recipe_of", lambda x: None)
        assert bits_are_equal(found, end_to_end(model))


def test_parts_that_are_written_to_before_the_backward_pass_are_told() -> None:
    """As torch tells it of whatever is kept."""
    x = torch.randn(4, 8, requires_grad=True) * 1
    made = x * 2
    remember(made, lambda x: x * 2, x)
    recipe = recipe_of(made)
    assert recipe is not None and torch.equal(recipe.maker.again(recipe.parts), made)
    with torch.no_grad():
        x.add_(1)
    assert recipe_of(made) is None


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    model = build("llama", torch.float32)
    with ExitStack() as stack:
        stack.enter_context(lean(model))
        ids = torch.arange(5, 20)[None]
        loss = model(input_ids=ids, labels=ids).loss
        rounds = []
        for _ in range(3):
            model.zero_grad()
            loss.backward(retain_graph=True)
            rounds.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert bits_are_equal(rounds[1], rounds[0]) and bits_are_equal(rounds[2], rounds[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_noted_where_no_gradient_is_wanted(mode: Callable[[], Any]) -> None:
    model = build("llama", torch.float32)
    with lean(model), mode():
        assert model(input_ids=torch.arange(5, 20)[None]).logits.isfinite().all()
        made = torch.ones(3)
        remember(made, lambda: torch.ones(3))
        assert recipe_of(made) is None
