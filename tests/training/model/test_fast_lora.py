"""The fused LoRA step against PEFT's own forward and backward, its reference."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapterhub_lite.training.model import fast_lora
from adapterhub_lite.training.model.fast_lora import FastLoraLinear, install_fast_lora, remove_fast_lora


def wrapped(dtype: torch.dtype = torch.float32, adapter_dtype: Any = None, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 16, bias=False)).to(dtype)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["0", "2"], **lora})
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    source = x.clone().requires_grad_()
    result = model(source)
    result.float().square().mean().backward()
    assert source.grad is not None
    return result, source.grad, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": ["2"]}])
def test_values_and_gradients_are_pefts(lora: dict[str, Any]) -> None:
    model = wrapped(**lora)
    x = torch.randn(3, 5, 24)
    wanted = run(model, x)
    assert install_fast_lora(model) == len(lora.get("target_modules", "02"))
    found = run(model, x)
    torch.testing.assert_close(found, wanted)
    assert set(found[2]) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_four_bits_it_is_pefts_over_the_unpacked_weight(dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    base = nn.Sequential(Linear4bit(64, 48, compute_dtype=dtype, quant_type="nf4"))
    base[0].weight.data = torch.randn(48, 64, dtype=dtype) / 8
    base[0].bias.data = torch.randn(48, dtype=dtype)
    model = get_peft_model(base.to("cpu"), LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.3)
    x = torch.randn(3, 5, 64, dtype=dtype)
    wanted = run(model, x)
    assert install_fast_lora(model) == 1
    found = run(model, x)
    # PEFT casts x to fp32 for the adapter, and the result back.
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted, **rounding)
    assert remove_fast_lora(model) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_eight_bits_it_is_pefts(dtype: torch.dtype, recwarn: Any) -> None:
    from bitsandbytes.nn import Linear8bitLt

    torch.manual_seed(0)
    plain = nn.Linear(64, 48).to(dtype)
    layer = Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    model = get_peft_model(nn.Sequential(layer).to("cpu"), LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.3)
    x = torch.randn(3, 5, 64, dtype=dtype)
    wanted = run(model, x)
    assert install_fast_lora(model) == 1
    # PEFT's own adapter is computed in fp32, and its sum rounded.
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(run(model, x), wanted, **rounding)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
def test_in_bf16_it_is_no_further_from_the_truth_than_peft(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(fast_lora, "low_rank_for", lambda x, rank: None)
    x = torch.randn(64, 24)
    truth = run(wrapped().double(), x.double())
    model = wrapped(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    theirs = run(model, x.bfloat16())
    install_fast_lora(model)
    ours = run(model, x.bfloat16())
    for name, gradient in truth[2].items():
        floor = 2e-2 * gradient.norm()
        assert (ours[2][name] - gradient).norm() <= 1.5 * (theirs[2][name] - gradient).norm() + floor, name
        assert ours[2][name].dtype == torch.float32


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True, "target_modules": ["0"]}]
)
def test_what_the_fast_path_does_not_cover_goes_pefts_way(lora: dict[str, Any]) -> None:
    model = wrapped(**lora).train()
    x = torch.randn(6, 24)
    torch.manual_seed(1)
    wanted = run(model, x)
    install_fast_lora(model)
    torch.manual_seed(1)
    torch.testing.assert_close(run(model, x), wanted)


def test_switched_off_merged_and_several_adapters_go_pefts_way() -> None:
    model = wrapped()
    x = torch.randn(6, 24)
    install_fast_lora(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), before)


def test_the_classes_come_and_go_and_the_state_stays() -> None:
    model = wrapped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert install_fast_lora(model) == 2 and install_fast_lora(model) == 0
    assert sum(isinstance(module, FastLoraLinear) for module in model.modules()) == 2
    assert remove_fast_lora(model) == 2
    assert not any(isinstance(module, FastLoraLinear) for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_autocast_is_left_to_peft() -> None:
    model = wrapped()
    x = torch.randn(6, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(x)
        install_fast_lora(model)
        torch.testing.assert_close(model(x), wanted)
