"""The lean step of each family against transformers' and PEFT's own: as many parts lean as there are, the same gradients."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.native import find_compiler
from adapterhub_lite.training import AdapterTrainingArguments
from adapterhub_lite.training.model import lean_blocks
from adapterhub_lite.training.model.fast_lora import install_fast_lora
from adapterhub_lite.training.model.lean_attention import install_lean_attention, remove_lean_attention
from adapterhub_lite.training.model.lean_modules import install_lean_modules, remove_lean_modules
from adapterhub_lite.training.model.segments import choose_packing, segment_inputs

LAYERS = 3
TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = ["sliding_attention", "full_attention", "sliding_attention"]
# family -> its own settings; every norm, gated MLP and attention of it is lean.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": GEMMA},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "phi3": {"partial_rotary_factor": 0.5},
}  # fmt: skip
NORMS = {"qwen3": 4 * LAYERS + 1, "gemma3_text": 6 * LAYERS + 1}
LENGTHS = (9, 4, 7, 9)
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


def build(family: str, dtype: torch.dtype, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **TINY, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(family != "gemma3_text"), std=0.2)
    model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def of_each_row(model: Any) -> dict[str, Tensor]:
    """Transformers' own way, one row at a time."""
    return gradients(model, sum(nll(model(input_ids=ids[None]).logits[0], ids) for ids in rows()))


def end_to_end(model: Any) -> dict[str, Tensor]:
    ids = torch.cat(rows())
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    logits = model(**segment_inputs({"input_ids": ids[None], "position_ids": positions[None]}), use_cache=False).logits[
        0
    ]
    return gradients(model, sum(nll(part, one) for part, one in zip(logits.split(LENGTHS), rows(), strict=True)))


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide[:-1], ids[1:], reduction="sum")


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    wrong = sum(float((found[name] - true[name]).square().sum()) for name in true)
    return (wrong / sum(float(tensor.square().sum()) for tensor in true.values())) ** 0.5


@contextmanager
def lean(model: Any) -> Iterator[tuple[int, int]]:
    assert choose_packing(model, AdapterTrainingArguments(output_dir="unused", use_cpu=True)).packs
    install_fast_lora(model)
    modules = install_lean_modules(model)
    yield modules, install_lean_attention(model)
    remove_lean_modules(model)
    remove_lean_attention(model)


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_lean_and_the_gradients_are_peft_s(family: str) -> None:
    model = build(family, torch.float32)
    wanted, before = of_each_row(model), [type(module) for module in model.modules()]
    with lean(model) as found:
        assert found == (NORMS.get(family, 2 * LAYERS + 1) + LAYERS, LAYERS)
        assert error(end_to_end(model), wanted) < 2e-6
        changed = [type(module) for module in model.modules()]
        assert sum(a is not b for a, b in zip(before, changed, strict=True)) > sum(found)


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_they_are_no_further_from_the_truth(family: str) -> None:
    """Over eight models: of one, two draws of the same noise are anything from 0.6 to 1.6 apart, by processor."""
    ours, theirs = [], []
    for seed in range(8):
        narrow = build(family, torch.bfloat16, seed)
        true = build(family, torch.float32, seed).double()
        true.load_state_dict(narrow.state_dict())
        truth = of_each_row(true)
        theirs.append(error(of_each_row(narrow), truth))
        with lean(narrow):
            ours.append(error(end_to_end(narrow), truth))
    assert math.hypot(*ours) <= 1.15 * math.hypot(*theirs), (ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_without_a_compiler_the_plain_forms_do_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_blocks, "lean_blocks", lambda: None)
    model = build(family, torch.float32)
    wanted = of_each_row(model)
    with lean(model) as (_, attentions):
        assert attentions == 0 and error(end_to_end(model), wanted) < 2e-6
