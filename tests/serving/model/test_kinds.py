"""Every kind of LoRA that PEFT makes is kept, served beside others in one batch, and merged, as PEFT itself computes it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub_lite import AdapterRegistry, merge_into_base
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import ConfigurationError, MergeError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from tests.serving.model.families import build

PROMPT = "Once upon a time, in a village by the sea, there lived"
WRITTEN = 8
Q = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": Q},
    "everything-linear": {"target_modules": "all-linear"},
    "biases": {"target_modules": Q, "lora_bias": True},
    "dora": {"target_modules": [*Q, "gate_proj"], "use_dora": True},
    "head": {"target_modules": [*Q, "lm_head"]},
    "embedding": {"target_modules": [*Q, "embed_tokens"]},
    "both-ends": {"target_modules": [*Q, "embed_tokens", "lm_head"]},
    "tied-ends": {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True},
    "saved-head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "saved-embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "saved-tied-ends": {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-norms": {"target_modules": Q, "modules_to_save": ["norm", "input_layernorm"]},
    "saved-blocks": {"target_modules": Q, "modules_to_save": ["layers.1.mlp"]},
    "tokens": {"target_modules": Q, "trainable_token_indices": [101, 68, 64, 77]},
    "tokens-of-both-ends": {
        "target_modules": Q, "trainable_token_indices": {"lm_head": [101], "embed_tokens": [64]},
    },
    "parameters": {"target_modules": Q, "target_parameters": ["mlp.up_proj.weight"]},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": KINDS["plain"],
    "everything-linear": KINDS["everything-linear"],
    "down": {"target_modules": Q, "target_parameters": ["experts.down_proj"]},
    "experts": {"target_modules": Q, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts-and-more": {
        "target_modules": Q, "target_parameters": ["experts.down_proj"], "trainable_token_indices": [64],
        "modules_to_save": ["norm"],
    },
}  # fmt: skip


def made(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """An adapter of PEFT's, moved off its beginning so that it changes every answer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    trained = ("lora_B", "lora_embedding_A", "magnitude", "modules_to_save", "trainable_tokens_delta")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in trained):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen2", KINDS),
        *(pytest.param(family, KINDS, marks=pytest.mark.slow) for family in ("llama", "gemma3_text")),
        *(pytest.param(family, EXPERTS, marks=pytest.mark.slow) for family in ("qwen3_moe", "lfm2_moe")),
    ],
    ids=["tied", "untied", "scaled embedding", "experts", "experts row by row"],
)
def test_a_kind_is_kept_served_and_merged_as_peft_computes_it(
    family: str, kinds: dict[str, dict[str, Any]], tmp_path: Path, home: Path, byte_tokenizer: Any
) -> None:
    base = build(family, tmp_path / "base", byte_tokenizer)
    resolved, registry = resolve_base(base), AdapterRegistry(home)
    attention = {"lfm2_moe": {"target_modules": ["q_proj", "v_proj"]}}
    for kind, settings in kinds.items():
        own = attention.get(family, {}) if settings["target_modules"] == Q else {}
        registry.add(made(base, tmp_path / kind, {**settings, **own}), kind, base=resolved, tell=lambda _: None)
    ids = byte_tokenizer.encode(PROMPT)
    with InferenceEngine.from_base(
        base, registry=registry, dtype="float32", end_tokens=frozenset(), device="cpu", max_rows=8
    ) as engine:
        before = engine.base_digest()
        asked = {
            kind: engine.submit(GenerationRequest(PROMPT, adapter=kind or None, max_new_tokens=WRITTEN))
            for kind in (*kinds, "")
        }
        answers = {kind: list(handle.result().token_ids) for kind, handle in asked.items()}
        assert engine.base_digest() == before
        apart = {one.name.partition(":")[0] for one in engine.resident() if one.apart}
    assert apart.isdisjoint({"plain"}) and apart >= kinds.keys() - {"plain", "everything-linear"}
    for kind in kinds:
        model = peft_model(base, tmp_path / kind)
        prompt = torch.tensor([ids])
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answers[kind] == out[0, len(ids) :].tolist(), kind
        try:
            merged = merge_into_base(kind, tmp_path / "merged", "float32", registry=registry, base=resolved, untie=True)
        except MergeError as error:
            assert kind == "biases" and "no bias that it could be added to" in str(error)
            continue
        plain = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-4)
        shutil.rmtree(merged.folder)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_what_stands_in_place_of_the_base_is_not_blended_and_what_adds_up_is(
    tmp_path: Path, home: Path, byte_tokenizer: Any
) -> None:
    base = build("qwen3_moe", tmp_path / "base", byte_tokenizer)
    registry = AdapterRegistry(home)
    kinds = {"experts": EXPERTS["experts"], "saved": KINDS["saved-norms"]}
    for kind, settings in kinds.items():
        registry.add(made(base, tmp_path / kind, settings), kind, base=resolve_base(base), tell=lambda _: None)
    with InferenceEngine.from_base(base, registry=registry, dtype="float32", device="cpu") as engine:
        with pytest.raises(ConfigurationError, match=r"saved:1 puts something in place.*at its full weight"):
            engine.generate(GenerationRequest("a", adapter="saved*0.5+experts*0.5", max_new_tokens=1))
        both = engine.generate(GenerationRequest(PROMPT, adapter="experts*0.5+experts*0.5", max_new_tokens=WRITTEN))
        whole = engine.generate(GenerationRequest(PROMPT, adapter="experts", max_new_tokens=WRITTEN))
        assert both.token_ids == whole.token_ids


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_tied_weight_is_untied_only_where_that_is_allowed(tmp_path: Path, home: Path, byte_tokenizer: Any) -> None:
    base = build("qwen2", tmp_path / "base", byte_tokenizer)
    registry = AdapterRegistry(home)
    registry.add(made(base, tmp_path / "a", KINDS["head"]), "a", base=resolve_base(base), tell=lambda _: None)
    with pytest.raises(MergeError, match=r"'lm_head'.*untie=True"):
        merge_into_base("a", tmp_path / "merged", registry=registry, base=resolve_base(base))
    assert not (tmp_path / "merged").exists()
