"""What the trainer starts, the registry keeps, and the engine serves or `merge` merges: asked before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapterhub_lite import AdapterRegistry, AdapterTrainer, AdapterTrainingArguments, merge_into_base
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

ROWS = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 2}]} for c in "abcd"]
R: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM"}
Q = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> ResolvedBase:
    """The tiny base, but with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2, bos_token_id=257, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return resolve_base(folder)


def trainer(base: ResolvedBase, out: Path, config: Any) -> AdapterTrainer:
    args = AdapterTrainingArguments(
        output_dir=str(out / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, show_progress=False,
        memory_preset="lora-fp32", learning_rate=1e-2, report_to="none", save_strategy="no",
    )  # fmt: skip
    return AdapterTrainer(str(base.folder), args, ROWS, peft_config=config)


KEPT: dict[str, tuple[Any, str]] = {
    "patterns": (
        lambda: LoraConfig(
            **R, target_modules=r".*\.(q_proj|v_proj)", rank_pattern={r"layers\.0\..*q_proj": 8},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 32},
        ),
        "served",
    ),
    "exclusion": (lambda: LoraConfig(**R, target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1.*"), "served"),
    "another task": (lambda: LoraConfig(r=4, **Q, task_type="SEQ_2_SEQ_LM"), "served"),
    "no task type": (lambda: LoraConfig(r=4, **Q), "served"),
    "olora": (lambda: LoraConfig(**R, **Q, init_lora_weights="olora"), "served"),
    "head": (lambda: LoraConfig(**R, target_modules=["q_proj", "lm_head"]), "merged"),
    "dora": (lambda: LoraConfig(**R, **Q, use_dora=True), "merged"),
    "LoRA biases": (lambda: LoraConfig(**R, **Q, lora_bias=True), "served"),
    "embeddings": (lambda: LoraConfig(**R, target_modules=["q_proj", "embed_tokens"]), "merged"),
    "saved modules": (lambda: LoraConfig(**R, **Q, modules_to_save=["norm", "lm_head"]), "merged"),
    "single tokens": (lambda: LoraConfig(**R, **Q, trainable_token_indices=[64, 65]), "merged"),
    "single parameters": (lambda: LoraConfig(**R, **Q, target_parameters=["mlp.up_proj.weight"]), "merged"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("name", KEPT)
def test_what_starts_is_kept_served_and_merged(name: str, untied: ResolvedBase, tmp_path: Path, home: Path) -> None:
    make, use = KEPT[name]
    run = trainer(untied, tmp_path, make())
    run.train()
    registry = AdapterRegistry(home)
    manifest = registry.add(run.save_adapter(tmp_path / "adapter"), "x", base=untied, verify="probes")
    with InferenceEngine.from_base(untied.folder, registry=registry, device="cpu") as engine:
        engine.generate(GenerationRequest(prompt="hi", adapter="x", max_new_tokens=2))
    if use == "served":
        return
    merged = merge_into_base("x", tmp_path / "merged", registry=registry, base=untied)
    assert merged.modules == manifest.lora.modules_bound
    before, after = (load_file(folder / "model.safetensors") for folder in (untied.folder, merged.folder))
    assert sum(not torch.equal(before[key], after[key]) for key in before) == merged.modules


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA of embeddings": (
        lambda: LoraConfig(**R, target_modules=["q_proj", "embed_tokens"], use_dora=True),
        "DoRA on an embedding",
    ),
    "biases": (lambda: LoraConfig(**R, **Q, bias="lora_only"), "sets bias"),
    "prompt tuning": (lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "is prompt tuning"),
    "prefix tuning": (lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "is prefix tuning"),
    "PiSSA with ranks": (
        lambda: LoraConfig(**R, **Q, init_lora_weights="pissa", rank_pattern={"q_proj": 2}),
        "ranks by module",
    ),
    "inference_mode": (lambda: LoraConfig(**R, **Q, inference_mode=True), "leave inference_mode out"),
    "PiSSA of rank 600": (lambda: LoraConfig(**{**R, "r": 600}, **Q, init_lora_weights="pissa"), "1024, got 1200"),
    "more layers": (lambda: LoraConfig(**R, **Q, layer_replication=[[0, 2], [1, 2]]), "makes the base grow"),
    "a scaling of 100": (lambda: LoraConfig(**R, **Q, lora_alpha=400), "scales by 100"),
    "activated LoRA": (lambda: LoraConfig(**R, **Q, alora_invocation_tokens=[1]), "alora_invocation_tokens"),
}


@pytest.mark.filterwarnings("ignore:.*aLoRA")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_refused_in_the_end_never_starts(name: str, untied: ResolvedBase, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ConfigurationError, match=reason):
        trainer(untied, tmp_path, make())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_rows_that_two_changes_would_reach_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Of a tied head, rows of tokens are changed with the embedding's; PEFT computes a LoRA on it beside that otherwise."""
    config = LoraConfig(**R, target_modules=["q_proj", "lm_head"], trainable_token_indices=[64])
    with pytest.raises(ConfigurationError, match="leave one of the two out"):
        trainer(resolve_base(tiny_base), tmp_path, config)


def test_another_method_of_weights_trains_and_is_kept_for_peft_alone(untied: ResolvedBase, tmp_path: Path) -> None:
    made = trainer(
        untied, tmp_path, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    made.train()
    made.save_model(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "adapter_model.safetensors").exists()
    with pytest.raises(ConfigurationError, match=r"no LoRA.*save_model"):
        made.save_adapter(tmp_path / "refused")
