"""Families that are not a Llama: what PEFT trains of them is counted, and their layers of several kinds are foreseen."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError
from adapterhub_lite.memory import GivenAdapter, Workload, dry_run, estimate_memory, find_preset, plan_memory
from adapterhub_lite.memory.estimate import OVERHEAD_BYTES, EstimateParts, ModelFacts
from adapterhub_lite.memory.tracing import StepBytes, lora_shape

LORA = find_preset("lora-bf16")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **WINDOWS, **PER_LAYER, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**WINDOWS, **PER_LAYER},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **EXPERTS, "n_routed_experts": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "lfm2_moe": {
        **EXPERTS, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2,
    },
}  # fmt: skip
QUICK = ("gemma3n_text", "gpt2", "qwen3_moe")
NAMED_OTHERWISE = {"gpt2": ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
"""Families whose configs know only these of `SIZES`."""


def config_of(family: str) -> Any:
    known = {name: size for name, size in SIZES.items() if name in NAMED_OTHERWISE.get(family, SIZES)}
    if family in ("bamba", "jamba", "recurrent_gemma", "rwkv", "lfm2_moe", "deepseek_v3", "mixtral"):
        known.pop("head_dim")
    return AutoConfig.for_model(family, **{**known, **MORE.get(family, {})})


def trained_by_peft(config: Any, **lora: Any) -> int:
    model = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        # PEFT says that it transposes GPT-2's layers.
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **lora))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mixtral", "jamba", "gemma3n_text"])
def test_the_lora_counted_is_the_one_that_peft_makes(family: str) -> None:
    """Experts, whose weights are no linear layers, and GPT-2's Conv1D among them."""
    config = config_of(family)
    found = ModelFacts(config).lora(LORA, Workload(1, 8, rank=4))
    assert found.parameters == trained_by_peft(config, target_modules="all-linear")


def test_a_lora_on_the_head_is_counted_with_its_gradient(small_config: Any) -> None:
    targets = ("q_proj", "lm_head")
    found = ModelFacts(small_config).lora(LORA, Workload(1, 8, rank=4, target_modules=targets))
    assert found.parameters == trained_by_peft(small_config, target_modules=list(targets))
    assert found.head_columns == 4

    def loss_bytes(names: tuple[str, ...]) -> int:
        facts, work = ModelFacts(small_config), Workload(1, 8, rank=4, target_modules=names)
        return EstimateParts(facts.shape, facts.lora(LORA, work), StepBytes(0, (0,), (0,), 0, 0), LORA, work).loss()

    assert loss_bytes(targets) > loss_bytes(("q_proj",))


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MORE],
)
def test_the_estimate_from_some_layers_is_near_the_dry_run_of_all(family: str) -> None:
    config, overhead = config_of(family), OVERHEAD_BYTES["cuda"]
    found = estimate_memory(config, "lora-bf16", batch_size=4, sequence_length=48, device="cuda")
    assert not found.unpredicted
    exact = dry_run(config, "lora-bf16", Workload(4, 48, device="cuda")) - overhead
    assert found.total - overhead == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.*q_proj": 9}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": {"lm_head": [3, 5]}},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["ranks", "a trained head", "rows of tokens", "experts"],
)
def test_a_handed_configuration_is_counted_as_peft_makes_it(given: dict[str, Any]) -> None:
    config = config_of("qwen3_moe")
    found = lora_shape(config, GivenAdapter.of(LoraConfig(r=4, **given)), rank=64)
    assert found.parameters == trained_by_peft(config, **given)
    tokens = given.get("trainable_token_indices", {}).get("lm_head", [])
    assert found.head_columns == (SIZES["hidden_size"] if "modules_to_save" in given else len(tokens))


class TestWhatCannotBeForeseen:
    """Layers that ask for the value of a tensor cannot run without one."""

    @pytest.fixture
    def opaque(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A Llama whose MLP looks at its values."""
        from transformers.models.llama.modeling_llama import LlamaMLP

        plain = LlamaMLP.forward

        def looking(self: Any, x: torch.Tensor) -> torch.Tensor:
            return plain(self, x) if float(x.sum()) < 1e9 else x

        monkeypatch.setattr(LlamaMLP, "forward", looking)
        return AutoConfig.for_model("llama", **{**SIZES, "hidden_act": "gelu"})

    def test_a_preset_by_name_is_planned_and_says_so(self, opaque: Any, machine: Any) -> None:
        plan = plan_memory(opaque, batch_size=2, sequence_length=16, machine=machine(8), preset="lora-bf16")
        assert plan.preset.name == "lora-bf16" and plan.batch_size == 2
        assert "fake tensors" in plan.predicted.unpredicted
        assert "at least" in plan.described() and "not predicted" in plan.described()
        assert plan.predicted.components["activations"] == 0 < plan.predicted.components["weights"]

    def test_the_ladder_goes_by_what_is_known(self, opaque: Any, machine: Any) -> None:
        plan = plan_memory(opaque, batch_size=2, sequence_length=16, machine=machine(8))
        assert plan.preset.name == "lora-bf16" and plan.predicted.unpredicted
        with pytest.raises(OutOfMemoryError, match="at least"):
            plan_memory(opaque, batch_size=2, sequence_length=16, machine=machine(0.1))

    def test_a_dry_run_of_it_is_refused_with_the_reason(self, opaque: Any) -> None:
        with pytest.raises(ConfigurationError, match="fake tensors"):
            dry_run(opaque, "lora-bf16", Workload(1, 8))


def test_a_lora_that_fits_no_layer_is_refused(small_config: Any, machine: Any) -> None:
    with pytest.raises(ConfigurationError, match="nothing_so_called"):
        plan_memory(
            small_config, batch_size=1, sequence_length=8, machine=machine(8), preset="lora-bf16",
            target_modules=["nothing_so_called"],
        )  # fmt: skip
