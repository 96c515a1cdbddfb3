"""Which modules a configuration means is what PEFT means by it; what would take forever is given up."""

import json
import time
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from adapterhub_lite.adapter_format.binding import bind
from adapterhub_lite.adapter_format.lora_config import (
    LoraConfigFile,
    PatternError,
    checked,
    named,
    read_lora_config,
    values_for,
)
from adapterhub_lite.adapter_format.strict_reading import TensorEntry

MODULES = [
    *(f"model.layers.{i}.{p}" for i in (0, 1, 11, 12) for p in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")),
    *(f"model.layers.1.mlp.experts.{i}.up_proj" for i in (0, 1)),
    "transformer.h.1.attn.c_attn", "h.1.attn.q_proj", "q_proj", "model.q_projector", "lm_head", "model.embed_tokens",
]  # fmt: skip
TARGETS: list[dict[str, Any]] = [
    {},
    {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
    {"target_modules": r".*\.(q_proj|v_proj)"},
    {"target_modules": r".*q_proj"},
    {"target_modules": "q_proj"},
    {
        "target_modules": r"(?:.*?(?:model|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.\d+\.mlp\.up_proj)"
    },
    {"exclude_modules": ["layers.1.self_attn.q_proj", "11.self_attn.q_proj"]},
    {"exclude_modules": r".*layers\.1.*"},
    {"exclude_modules": "layers"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0},
    {"layers_to_transform": []},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": "h"},
    {"layers_to_transform": [0, 11], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [1], "layers_pattern": "(layers|h)"},
    {"layers_to_transform": [0], "target_modules": ["up_proj"]},
    {"layers_to_transform": [0], "target_modules": ["model.layers.11.mlp.up_proj", "q_proj"]},
]
PATTERNS: list[dict[str, int]] = [
    {"q_proj": 3},
    {r"layers\.0\..*q_proj": 3},
    {"^model.layers.0.self_attn.q_proj": 3},
    {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
    {"q_proj": 2, "layers.1.self_attn.q_proj": 3},
    {"self_attn": 3},
    {"model.layers.*": 3},
    {r".*\.(q|v)_proj": 3, "mlp.up_proj": 5},
    {"layers.1": 3},
    {r"(\w+)\.up_proj": 3},
    {"1.self_attn.v_proj": 3},
    {"a|q_proj": 3},
]


def read(**changes: Any) -> LoraConfigFile:
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **changes}
    return read_lora_config(json.dumps(plain).encode())


@pytest.mark.parametrize("changes", TARGETS, ids=str)
def test_targets_are_those_of_peft(changes: dict[str, Any]) -> None:
    theirs = LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **changes})
    wanted = {module for module in MODULES if check_target_module_exists(theirs, module)}
    assert read(**changes).targets(MODULES) == wanted


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ranks_and_alphas_by_pattern_are_those_of_peft(pattern: dict[str, int]) -> None:
    wanted = {m: pattern[key] for m in MODULES if (key := get_pattern_key(list(pattern), m)) in pattern}
    assert values_for(pattern, MODULES) == wanted
    resolved = read(rank_pattern=pattern, alpha_pattern=pattern).resolved(MODULES)
    assert values_for(resolved.rank_pattern, MODULES) == wanted
    assert values_for(resolved.alpha_pattern, MODULES) == wanted


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
def test_the_scaling_of_each_module_is_what_peft_applies(pattern: dict[str, int], rslora: bool) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": r".*\.(q_proj|up_proj)", "use_rslora": rslora,
        "rank_pattern": pattern, "alpha_pattern": {r"layers\.1\..*": 5},
    }  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings))
    truth = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    entries = [
        TensorEntry(f"base_model.model.{name}.{part}", "F32", shape, 0, 0)
        for name in truth
        for rank in [model.get_submodule(f"base_model.model.{name}").r["default"]]
        for part, shape in (("lora_A.weight", (rank, 8)), ("lora_B.weight", (8, rank)))
    ]
    shapes = dict.fromkeys(truth, (8, 8))
    bound = bind(read(**settings), entries, shapes)
    assert not bound.problems and bound.lora is not None
    assert {name: bound.lora.scaling_of(name) for name in truth} == pytest.approx(truth)
    assert bound.config.target_modules == ["q_proj", "up_proj"] and bound.lora.modules_total == len(truth) == 4


@pytest.mark.parametrize("evil", ["(([a-z]+[._])*)*!", "(.*)*x!", "(a|a)*$!", "(.*.*.*.*.*.*.*)*!"])
def test_a_pattern_that_never_ends_is_given_up(evil: str) -> None:
    started = time.process_time()
    for look in (lambda: named(evil, MODULES * 100), lambda: values_for({evil: 1}, MODULES * 100)):
        try:
            look()
        except PatternError as error:
            assert "takes too long" in str(error)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ["(", "a{1000}{1000}", "[", "(?P<a", "*", "(" * 900 + ")" * 900])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PatternError):
        checked(text)
