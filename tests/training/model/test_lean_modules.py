"""The lean RMSNorm and gated MLP against transformers' own: the same bits forward, or compiled the same up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.bases.layer_parts import Activation
from adapterhub_lite.memory import find_preset, prepare_for_training
from adapterhub_lite.native import find_compiler
from adapterhub_lite.training.model import lean_blocks
from adapterhub_lite.training.model.lean_modules import (
    LeanGate,
    LeanJoinedGate,
    LeanNorm,
    install_lean_modules,
    opened,
    remove_lean_modules,
)

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def model(tiny_base: Path) -> Any:
    made = AutoModelForCausalLM.from_pretrained(tiny_base)
    made.requires_grad_(False)
    return made


def run(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    source = x.clone().requires_grad_()
    result = module(source)
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    assert source.grad is not None
    return result.detach(), source.grad


@pytest.mark.parametrize("way", ["plain", "compiled"])
def test_each_block_gives_the_numbers_and_gradients_of_its_own(
    model: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "plain":
        monkeypatch.setattr(lean_blocks, "lean_blocks", lambda: None)
    layer = model.model.layers[0]
    x = torch.randn(2, 7, 32)
    wanted = [run(layer.input_layernorm, x), run(layer.mlp, x)]
    assert install_lean_modules(model) == 7
    found = [run(layer.input_layernorm, x), run(layer.mlp, x)]
    for (ours, grad), (theirs, reference) in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs) or way == "compiled"
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)


def test_the_whole_model_is_the_same_and_gets_its_classes_back(model: Any) -> None:
    before = [type(module) for module in model.modules()]
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    wanted = model(tokens).logits
    install_lean_modules(model)
    torch.testing.assert_close(model(tokens).logits, wanted)
    assert install_lean_modules(model) == 0
    remove_lean_modules(model)
    assert [type(module) for module in model.modules()] == before


def test_the_gradients_are_those_of_the_plain_formula() -> None:
    weight = torch.rand(50) + 0.5
    x, outer = torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)
    plain = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    (wanted,) = torch.autograd.grad(plain, x, outer)
    (found,) = torch.autograd.grad(LeanNorm.apply(x, weight, 1e-5), x, outer)
    torch.testing.assert_close(found, wanted)
    for activation in ("silu", "gelu_tanh"):
        gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(LeanGate.apply, (gate, up, activation))
        assert torch.autograd.gradcheck(LeanJoinedGate.apply, (torch.cat([gate, up], -1), activation))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 37])
def test_the_compiled_gate_is_no_further_from_the_truth_than_the_plain_one(
    rows: int, activation: Activation, dtype: torch.dtype
) -> None:
    # Odd widths leave a rest behind the vectors; large values are where an exponential goes wrong.
    gate, up, outer = (scale * torch.randn(rows, 101).to(dtype) for scale in (20.0, 1.0, 1.0))
    gate[0, :3] = torch.tensor([200.0, -200.0, 0.0])
    wide = [x.double().requires_grad_() for x in (gate, up)]
    truth = opened(wide[0], activation) * wide[1]
    plain = [x.clone().requires_grad_() for x in (gate, up)]
    theirs = opened(plain[0], activation) * plain[1]
    lean = [x.clone().requires_grad_() for x in (gate, up)]
    ours = LeanGate.apply(*lean, activation)
    results = [
        (made.detach(), *torch.autograd.grad(made, inputs, outer.to(made.dtype)))
        for made, inputs in ((truth, wide), (theirs, plain), (ours, lean))
    ]
    for true, other, found in zip(*results, strict=True):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (found, other))
        # In fp32, the few roundings by which an exponential is off where there is no wider sum.
        assert error <= 1.1 * allowed + (6e-7 if dtype == torch.float32 else 0)


@needs_compiler
def test_what_is_not_a_number_stays_so() -> None:
    x = torch.full((2, 40), float("nan"), dtype=torch.bfloat16)
    assert LeanNorm.apply(x, x[0], 1e-6).isnan().all() and LeanGate.apply(x, x.zero_().add_(1)).isfinite().all()
    assert LeanGate.apply(torch.full_like(x, float("nan")), x).isnan().all()


@pytest.mark.parametrize("name", ["qlora-nf4", "lora-int8"])
def test_blocks_over_packed_weights_are_lean_too(tiny_base: Path, name: str) -> None:
    preset = find_preset(name)
    model = load_base_model(tiny_base, dtype=preset.torch_dtype, quantization_config=preset.quantization_config())
    assert install_lean_modules(prepare_for_training(model, preset)) == 7


def test_a_norm_that_is_trained_keeps_its_own_forward(model: Any) -> None:
    install_lean_modules(model)
    norm = model.model.norm
    norm.weight.requires_grad_(True)
    norm(torch.randn(2, 32)).sum().backward()
    assert norm.weight.grad is not None


def test_a_block_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    odd = OddRMSNorm()
    assert install_lean_modules(odd) == 0 and type(odd) is OddRMSNorm
