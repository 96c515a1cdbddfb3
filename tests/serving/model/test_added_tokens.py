"""Adapters with tokens of their own: kept with their rows and texts, served beside others, merged, as PEFT computes it.

The peer is plain PEFT on a base that was resized, with a tokenizer that has the tokens.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterhub_lite import AdapterRegistry, merge_into_base
from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import AdapterRejectedError, ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from tests.serving.model.families import small_base

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore:The following (rank|alpha)_pattern:RuntimeWarning"
)
TEXTS = ["<call>", "</call>"]
PROMPT = "Once upon a time <call>there lived</call> an old"
WRITTEN = 8
Q = ["q_proj", "v_proj"]
WAYS: dict[str, dict[str, Any]] = {
    "resized-alone": {},
    "trained-rows": {"trainable_token_indices": "new"},
    "rows-and-old-ones": {"trainable_token_indices": "old and new"},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def made(base: Path, folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """What PEFT saves of an adapter on a base resized by two tokens; rows and pairs are moved, so that all of them count."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    first = len(tokenizer)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(TEXTS)
    model.resize_token_embeddings(len(grown), mean_resizing=False)
    ids = {"new": [first, first + 1], "old and new": [70, first, first + 1, 101]}
    if isinstance(settings.get("trainable_token_indices"), str):
        settings = {**settings, "trainable_token_indices": ids[settings["trainable_token_indices"]]}
    with torch.no_grad():
        for rows in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            rows.weight[first:] += torch.randn(2, rows.weight.shape[1], generator=torch.Generator().manual_seed(2))
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if tied and "lm_head" in name:
                continue
            if any(part in name for part in ("lora_B", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    if tied and settings.get("modules_to_save"):
        adapted.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight = (
            adapted.get_submodule("base_model.model.model.embed_tokens").modules_to_save["default"].weight
        )
    adapted.save_pretrained(folder)
    grown.save_pretrained(folder)
    return folder


def peer(base: Path, adapter: Path, tokens: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("family", ["qwen2", "llama", pytest.param("phi3_longrope", marks=pytest.mark.slow)])
def test_new_tokens_are_kept_served_and_merged(
    family: str, tmp_path: Path, home: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = small_base(family, tmp_path / "base", byte_tokenizer, monkeypatch)
    resolved, registry, first = resolve_base(base), AdapterRegistry(home), len(tokenizer)
    targets = ["qkv_proj"] if family.startswith("phi3") else Q
    models, grown = {}, None
    for way, settings in WAYS.items():
        folder = made(base, tmp_path / way, tokenizer, target_modules=targets, **settings)
        manifest = registry.add(folder, way, base=resolved, tell=lambda _: None)
        assert ADDED_TOKENS_FILE in manifest.files
        models[way], grown = peer(base, folder, first + 2), AutoTokenizer.from_pretrained(folder)
        # What is kept loads as plain PEFT does, and has no more of the embedding than its new rows, unless all was trained.
        kept = registry.export(way, tmp_path / f"{way}-kept")
        rows = [t.shape[0] for name, t in load_file(kept / "adapter_model.safetensors").items() if "lora" not in name]
        assert max(rows) == (first + 2 if way == "saved" else 4 if way == "rows-and-old-ones" else 2)
        again = peer(base, kept, first + 2)
        ids = torch.tensor([grown.encode(PROMPT)])
        torch.testing.assert_close(again(ids).logits, models[way](ids).logits, rtol=1e-5, atol=1e-5)
    assert grown is not None and first in grown.encode(PROMPT)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with InferenceEngine.from_base(
        base, registry=registry, dtype="float32", end_tokens=frozenset(), device="cpu", max_rows=8
    ) as engine:
        before = engine.base_digest()
        asked = {
            way: engine.submit(GenerationRequest(PROMPT, adapter=way or None, max_new_tokens=WRITTEN, logprobs=2))
            for way in (*WAYS, "")
        }
        answers = {way: handle.result() for way, handle in asked.items()}
        assert engine.base_digest() == before
        with pytest.raises(ConfigurationError, match=f"this base has the tokens 0 to {first - 1}"):
            engine.generate(GenerationRequest(prompt_token_ids=[first], max_new_tokens=1))
        with pytest.raises(ConfigurationError, match=f"base and adapter have the tokens 0 to {first + 1}"):
            engine.generate(GenerationRequest(prompt_token_ids=[first + 2], adapter="saved", max_new_tokens=1))
        # The likeliest by a bias that nothing stands against: its text is the adapter's.
        told = engine.generate(GenerationRequest(PROMPT, adapter="saved", max_new_tokens=1, logit_bias={first: 100.0}))
        assert list(told.token_ids) == [first] and told.text == "<call>"
    for way, model in {**models, "": plain}.items():
        own = tokenizer if way == "" else grown
        ids = torch.tensor([own.encode(PROMPT)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        assert list(answers[way].token_ids) == out.tolist(), way
        logprobs = model(torch.cat((ids, out[None]), 1)).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        for place, heard in enumerate(answers[way].logprobs):
            assert abs(heard.logprob - float(logprobs[place, heard.token_id])) < 1e-3, (way, place)
    for way, model in models.items():
        merged = merge_into_base(way, tmp_path / "merged", "float32", registry=registry, base=resolved, untie=True)
        whole = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
        there = AutoTokenizer.from_pretrained(merged.folder)
        assert whole.config.vocab_size == first + 2 and there.encode(PROMPT) == grown.encode(PROMPT)
        ids = torch.tensor([grown.encode(PROMPT)])
        with torch.no_grad():
            torch.testing.assert_close(whole(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert merged.relative_error < 1e-6
        shutil.rmtree(merged.folder)


@pytest.fixture
def adapter(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ResolvedBase, Path]:
    base, tokenizer = small_base("llama", tmp_path / "base", byte_tokenizer, monkeypatch)
    return resolve_base(base), made(base, tmp_path / "a", tokenizer, target_modules=Q)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("wrong", ["no head", "a gap", "trained", "other numbers", "known already", "shrunk"])
def test_rows_and_texts_that_do_not_fit_are_refused(
    wrong: str, adapter: tuple[ResolvedBase, Path], home: Path, byte_tokenizer: Any
) -> None:
    base, folder = adapter
    tensors, config, first = load_file(folder / "adapter_model.safetensors"), config_of(folder), len(byte_tokenizer)
    head, embedding = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    tokens = {"id": first, "content": "<call>"}
    said = {
        "no head": "has rows of 261 tokens and lm_head.weight has not",
        "a gap": "of the tokens 259 to 260, which the base has not, some have no row",
        "trained": "differ from the base's own",
        "other numbers": r"the number 260, and the base's tokenizer gives it 259",
        "known already": "has '<\\|im_end\\|>' already",
        "shrunk": "resizing took rows away",
    }
    if wrong == "no head":
        del tensors[head]
    elif wrong == "a gap":
        tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = tensors.pop(embedding)[
            -1:
        ].clone()
        config["trainable_token_indices"] = {"embed_tokens": [first + 1]}
    elif wrong == "trained":
        tensors[embedding] = tensors[embedding] + 1e-3
    elif wrong == "shrunk":
        for name in (head, embedding):
            tensors[name] = tensors[name][: first - 4].clone() + 1e-3
        config["modules_to_save"] = ["embed_tokens", "lm_head"]
    elif wrong == "other numbers":
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps({"tokens": [{**tokens, "id": first + 1}]}))
    else:
        (folder / ADDED_TOKENS_FILE).write_text(json.dumps({"tokens": [{**tokens, "content": "<|im_end|>"}]}))
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterRejectedError, match=said[wrong]):
        AdapterRegistry(home).add(folder, "a", base=base, tell=lambda _: None)


def test_the_texts_decide_the_digest_and_without_them_that_is_said(
    adapter: tuple[ResolvedBase, Path], home: Path
) -> None:
    base, folder = adapter
    registry, heard = AdapterRegistry(home), list[str]()
    first = registry.add(folder, "a", base=base, tell=heard.append)
    assert any("the texts of 2 new tokens" in line for line in heard)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<call>", "<tool>"))
    assert registry.add(folder, "a", base=base, tell=heard.append).digest != first.digest
    (folder / "tokenizer.json").unlink()
    heard.clear()
    registry.add(folder, "a", base=base, tell=heard.append)
    assert any("have no texts here" in line for line in heard)


def test_a_token_that_nobody_has_a_row_for_is_left_out(
    tmp_path: Path, home: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do who add a padding token and resize nothing."""
    base, tokenizer = small_base("llama", tmp_path / "base", byte_tokenizer, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=Q, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "a")
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(tmp_path / "a")
    manifest = AdapterRegistry(home).add(tmp_path / "a", "a", base=resolve_base(base), tell=lambda _: None)
    assert ADDED_TOKENS_FILE not in manifest.files
