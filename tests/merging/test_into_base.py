"""Merged weights = base + delta in fp32 from the pristine base; twice, tied and quantised are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases import ResolvedBase, base_fingerprint, resolve_base
from adapterhub_lite.errors import BaseMismatchError, MergeError, UsageError
from adapterhub_lite.merging import merge_into_base
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry

Add = Callable[..., AdapterManifest]
IDS = torch.arange(5, 60)[None]


def _unmerged(base: Path, adapter: Path, dtype: torch.dtype) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 1}}], ids=["plain", "rs", "pattern"]
)
def test_merged_weights_are_base_plus_delta(
    lora: dict[str, Any], add: Add, deltas: Any, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path
) -> None:
    manifest = add("a", seed=1, **lora)
    before = base_fingerprint(base.folder)
    merged = merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    pristine, found = load_file(base.folder / "model.safetensors"), load_file(merged.folder / "model.safetensors")
    changes = {f"{module}.weight": delta for module, delta in deltas("a:1").items()}
    assert set(pristine) == set(found)
    for name, weight in pristine.items():
        torch.testing.assert_close(found[name], weight + changes.get(name, 0.0))
        assert (name in changes) == (not torch.equal(found[name], weight))
    assert (merged.modules, merged.relative_error, merged.dtype) == (6, 0.0, "float32")
    assert merged.adapter_digest == manifest.digest
    assert base_fingerprint(base.folder) == before == merged.base_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_model_is_plain_and_answers_as_base_and_adapter(
    dtype: torch.dtype, add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path
) -> None:
    add("a", seed=1)
    adapter = registry.export("a", tmp_path / "adapter")
    merged = merge_into_base("a", tmp_path / "out", dtype, registry=registry, base=base)
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert model.dtype == dtype
    with torch.no_grad():
        found = model(input_ids=IDS).logits.float()
    truth = _unmerged(base.folder, adapter, torch.float32)
    if dtype == torch.float32:
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        return
    # No further from the fp32 truth than base and adapter are in this dtype, with room for one rounding.
    naive = (_unmerged(base.folder, adapter, dtype) - truth).abs().max()
    assert (found - truth).abs().max() <= 2 * naive + torch.finfo(dtype).eps * truth.abs().max()
    assert 0 < merged.relative_error < 0.05


def test_a_bf16_base_is_added_to_in_fp32(
    make_adapter: Any, registry: AdapterRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    base = resolve_base(tmp_path / "bf16")
    source = make_adapter(seed=1)
    registry.add(source, "a", base=base)
    merged = merge_into_base("a", tmp_path / "out", "float32", registry=registry, base=base)
    pristine, found = load_file(base.folder / "model.safetensors"), load_file(merged.folder / "model.safetensors")
    lora = load_file(source / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(found[f"{name}.weight"], pristine[f"{name}.weight"].float() + 2.0 * b @ a)
    assert found["model.norm.weight"].dtype == torch.float32


def test_the_receipt_lies_with_the_model(
    add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path
) -> None:
    add("a", seed=1)
    merged = merge_into_base("a", tmp_path / "out", "bfloat16", registry=registry, base=base)
    receipt = json.loads((merged.folder / "merge_receipt.json").read_text())
    assert receipt["adapter_digest"] == merged.adapter_digest
    assert receipt["relative_error"] == merged.relative_error
    assert receipt["fingerprint"] == base_fingerprint(merged.folder) == merged.fingerprint
    # Measured again from the files alone.
    exact = load_file(
        merge_into_base("a", tmp_path / "exact", registry=registry, base=base).folder / "model.safetensors"
    )
    pristine, rounded = load_file(base.folder / "model.safetensors"), load_file(merged.folder / "model.safetensors")
    changed = [name for name in exact if not torch.equal(exact[name], pristine[name])]
    lost = sum(float((rounded[n].double() - exact[n].double()).square().sum()) for n in changed)
    added = sum(float((exact[n].double() - pristine[n].double()).square().sum()) for n in changed)
    assert merged.relative_error == pytest.approx((lost / added) ** 0.5, rel=1e-3)


def test_merging_twice_is_refused(add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path) -> None:
    add("a", seed=1)
    merged = merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    with pytest.raises(UsageError, match="not empty"):
        merge_into_base("a", merged.folder, registry=registry, base=base)
    with pytest.raises(MergeError, match=r"already has an adapter merged.*merge_adapters"):
        merge_into_base("a", tmp_path / "again", registry=registry, base=resolve_base(merged.folder))
    (merged.folder / "merge_receipt.json").unlink()
    with pytest.raises(BaseMismatchError, match="pristine"):
        merge_into_base("a", tmp_path / "again", registry=registry, base=resolve_base(merged.folder))
    assert not (tmp_path / "again").exists()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_is_refused(
    stored: bool, make_adapter: Any, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path
) -> None:
    """Also where the base's file holds the head beside the embedding: they are one matrix all the same."""
    if stored:
        shutil.copytree(base.folder, tmp_path / "base", ignore=shutil.ignore_patterns(".*"))
        weights = tmp_path / "base" / "model.safetensors"
        tensors = load_file(weights)
        save_file(
            {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights, {"format": "pt"}
        )
        base = resolve_base(tmp_path / "base")
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(seed=1, targets=("q_proj", "lm_head")), folder)
    # PEFT saves the whole embedding along, which is no adapter.
    tensors = {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_" in n}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert registry.add(folder, "a", base=base).lora.modules_total == 3
    with pytest.raises(MergeError, match=r"'lm_head'.*shares.*untie"):
        merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    assert set(tmp_path.iterdir()) - {tmp_path / "base"} == {folder}


def test_quantised_weights_are_refused(
    make_adapter: Any, registry: AdapterRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_base, quantised, ignore=shutil.ignore_patterns(".fingerprint.json"))
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    base = resolve_base(quantised)
    registry.add(make_adapter(seed=1), "a", base=base)
    with pytest.raises(MergeError, match=r"quantised.*full-precision"):
        merge_into_base("a", tmp_path / "out", registry=registry, base=base)


def test_an_adapter_of_a_quantised_base_wants_a_decision(
    make_adapter: Any, registry: AdapterRegistry, base: ResolvedBase, training_record: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(seed=1), folder)
    (folder / "training_record.json").write_text(training_record(base, quantization="nf4").model_dump_json())
    registry.add(folder, "a", base=base)
    with pytest.raises(MergeError, match=r"quantised as nf4.*from_pristine=True"):
        merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    assert merge_into_base("a", tmp_path / "out", registry=registry, base=base, from_pristine=True).modules == 6


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_biases_are_refused(add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path) -> None:
    add("a", seed=1, lora_bias=True)
    with pytest.raises(MergeError, match="no bias that it could be added to"):
        merge_into_base("a", tmp_path / "out", registry=registry, base=base)


def test_a_dora_is_merged_exactly(add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path) -> None:
    add("a", seed=1, use_dora=True)
    adapter = registry.export("a", tmp_path / "adapter")
    merged = merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged.folder)(input_ids=IDS).logits
    torch.testing.assert_close(found, _unmerged(base.folder, adapter, torch.float32), rtol=1e-4, atol=1e-4)


def test_transposed_weights_are_merged_transposed(
    registry: AdapterRegistry, byte_tokenizer: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    source.save_pretrained(tmp_path / "gpt2")
    byte_tokenizer.save_pretrained(tmp_path / "gpt2")
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    base = resolve_base(tmp_path / "gpt2")
    assert registry.add(tmp_path / "adapter", "a", base=base).lora.modules_bound == 2
    merged = merge_into_base("a", tmp_path / "out", registry=registry, base=base)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged.folder)(input_ids=IDS).logits
        torch.testing.assert_close(found, model.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_wrong_wishes_are_named(add: Add, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path) -> None:
    add("a", seed=1)
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        merge_into_base("a", tmp_path / "out", "int4", registry=registry, base=base)
    with pytest.raises(UsageError, match="on this machine"):
        merge_into_base("a", tmp_path / "out", registry=registry)
