"""Merging adapters: what PEFT gets wrong is a test here, against the deltas that PEFT itself applies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import BaseMismatchError, MergeError, UnknownNameError, UsageError
from adapterhub_lite.merging import merge_adapters, rebuild_merge
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry

Add = Callable[..., AdapterManifest]
Deltas = Callable[[str], dict[str, torch.Tensor]]
METHODS = ("cat", "svd", "ties", "dare_ties", "linear")
# Products of fp32 factors of these sizes agree to about this much.
EXACT = 2e-6


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative Frobenius distance over all modules together; the modules have to be the same."""
    assert set(found) == set(wanted)
    wrong = sum(float((found[m] - wanted[m]).double().square().sum()) for m in wanted)
    return (wrong / sum(float(wanted[m].double().square().sum()) for m in wanted)) ** 0.5


def weighted(parts: list[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    """The exact weighted sum of deltas, module by module."""
    total: dict[str, torch.Tensor] = {}
    for delta, weight in parts:
        for module, value in delta.items():
            total[module] = total.get(module, torch.zeros_like(value)) + weight * value
    return total


@pytest.fixture
def merge(registry: AdapterRegistry, base: ResolvedBase) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return merge_adapters(*args, registry=registry, base=base, **kwargs)

    return run


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (2.0, 0.5), (-0.5, -0.25)])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_svd_are_the_weighted_sum(
    method: Any, weights: tuple[float, float], add: Add, merge: Callable[..., Any], deltas: Deltas
) -> None:
    add("a", seed=1)
    add("b", seed=2)
    merged = merge(["a", "b"], weights, method)
    truth = weighted([(deltas("a:1"), weights[0]), (deltas("b:1"), weights[1])])
    assert distance(deltas(merged.manifest.reference), truth) < EXACT
    assert merged.relative_error < EXACT
    assert merged.manifest.lora.rank == 8


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"alpha": 3, "rank": 6}], ids=["plain", "rslora", "odd"])
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_itself(
    method: Any, weight: float, lora: dict[str, Any], add: Add, merge: Callable[..., Any], deltas: Deltas
) -> None:
    add("a", seed=1, **lora)
    merged = merge(["a"], [weight], method, density=1.0)
    assert distance(deltas(merged.manifest.reference), weighted([(deltas("a:1"), weight)])) < EXACT
    assert merged.relative_error < EXACT


def test_unequal_ranks_targets_and_scalings_add_up(add: Add, merge: Callable[..., Any], deltas: Deltas) -> None:
    add("a", seed=1, rank=2, alpha=5, targets=("q_proj", "v_proj"))
    add("b", seed=2, rank=8, targets=("v_proj", "down_proj"), use_rslora=True)
    add("c", seed=3, rank=3, targets=("q_proj",), layers_to_transform=[1])
    merged = merge(["a", "b", "c"], [1.0, -0.5, 0.25])
    truth = weighted([(deltas("a:1"), 1.0), (deltas("b:1"), -0.5), (deltas("c:1"), 0.25)])
    assert distance(deltas(merged.manifest.reference), truth) < EXACT
    lora = merged.manifest.lora
    assert (lora.rank, lora.scaling, lora.modules_bound) == (10, 1.0, 6)


def test_a_merge_names_its_base(
    add: Add, merge: Callable[..., Any], registry: AdapterRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    add("a", seed=1)
    add("b", seed=2)
    caplog.clear()
    manifest = merge(["a", "b"]).manifest
    named = json.loads(registry.file(manifest, "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == manifest.base.id and not caplog.messages


def test_patterns_of_rank_and_alpha_are_honoured(add: Add, merge: Callable[..., Any], deltas: Deltas) -> None:
    add("a", seed=1, rank_pattern={"q_proj": 7}, alpha_pattern={"layers.1.self_attn.v_proj": 20})
    add("b", seed=2)
    merged = merge(["a", "b"], [1.0, 1.0])
    truth = weighted([(deltas("a:1"), 1.0), (deltas("b:1"), 1.0)])
    assert distance(deltas(merged.manifest.reference), truth) < EXACT


def test_a_smaller_rank_is_the_best_one_and_says_its_error(add: Add, merge: Callable[..., Any], deltas: Deltas) -> None:
    add("a", seed=1)
    add("b", seed=2)
    merged = merge(["a", "b"], [0.7, 0.3], "svd", rank=5)
    truth = weighted([(deltas("a:1"), 0.7), (deltas("b:1"), 0.3)])
    lost = sum(float(torch.linalg.svdvals(t.double())[5:].square().sum()) for t in truth.values())
    total = sum(float(t.double().square().sum()) for t in truth.values())
    best = (lost / total) ** 0.5
    assert 0.05 < best < 1
    assert distance(deltas(merged.manifest.reference), truth) == pytest.approx(best, rel=1e-3)
    assert merged.relative_error == pytest.approx(best, rel=1e-3)
    assert merged.manifest.recipe is not None and merged.manifest.recipe.relative_error == merged.relative_error


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_the_rough_methods_confess(method: Any, add: Add, merge: Callable[..., Any], deltas: Deltas) -> None:
    add("a", seed=1)
    add("b", seed=2)
    merged = merge(["a", "b"], [0.7, 0.3], method)
    truth = weighted([(deltas("a:1"), 0.7), (deltas("b:1"), 0.3)])
    measured = distance(deltas(merged.manifest.reference), truth)
    assert measured > 0.2
    assert merged.relative_error == pytest.approx(measured, rel=1e-4)


def test_ties_does_what_the_paper_says(add: Add, merge: Callable[..., Any], deltas: Deltas) -> None:
    add("a", seed=1)
    add("b", seed=2)
    merged = merge(["a", "b"], [1.0, 0.5], "ties", density=0.2, rank=32)
    ours = deltas(merged.manifest.reference)
    parents = [(deltas("a:1"), 1.0), (deltas("b:1"), 0.5)]
    for module, found in ours.items():
        trimmed = []
        for delta, weight in parents:
            flat = delta[module].flatten()
            top = flat.abs().topk(int(0.2 * flat.numel())).indices
            trimmed.append(weight * torch.zeros_like(flat).scatter(0, top, flat[top]).view_as(delta[module]))
        stack = torch.stack(trimmed)
        elected = stack.sum(0).sign()
        agree = (stack.sign() == elected) & (stack != 0)
        wanted = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_random_follows_the_seed(add: Add, merge: Callable[..., Any]) -> None:
    add("a", seed=1)
    add("b", seed=2)
    first, again, other = (merge(["a", "b"], None, "dare_ties", seed=seed).manifest for seed in (7, 7, 8))
    assert first.digest == again.digest != other.digest
    assert (first.version, again.version, other.version) == (1, 2, 3), "a name that exists gets a new version"


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_rebuilt_bit_for_bit(
    method: Any, add: Add, merge: Callable[..., Any], registry: AdapterRegistry
) -> None:
    add("a", seed=1)
    add("b", seed=2, rank=6)
    rank = {"rank": 5} if method in ("svd", "ties", "dare_ties") else {}
    merged = merge(["a", "b"], [0.9, -0.3], method, seed=3, density=0.3, **rank).manifest
    assert [(p.reference, p.weight) for p in merged.parents] == [("a:1", 0.9), ("b:1", -0.3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert rebuild_merge(merged.reference, registry=registry)
    finally:
        torch.set_num_threads(before)
    with pytest.raises(UsageError, match="not a merge"):
        rebuild_merge("a", registry=registry)
    registry.remove("a:1")
    with pytest.raises(UnknownNameError, match="parent a:1"):
        rebuild_merge(merged.reference, registry=registry)


def test_a_merge_of_merges_answers_as_the_sum(
    add: Add, merge: Callable[..., Any], deltas: Deltas, registry: AdapterRegistry, base: ResolvedBase, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for index, name in enumerate("abc"):
        add(name, seed=index)
    half = merge(["a", "b"], [0.5, 0.5], name="half").manifest
    whole = merge([half.reference, "c"], [1.0, 2.0], name="whole").manifest
    truth = weighted([(deltas("a:1"), 0.5), (deltas("b:1"), 0.5), (deltas("c:1"), 2.0)])
    assert distance(deltas(whole.reference), truth) < EXACT
    plain = AutoModelForCausalLM.from_pretrained(base.folder)
    ids = torch.arange(3, 40)[None]
    answer = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.folder), registry.export("whole", tmp_path / "whole")
    )(input_ids=ids).logits
    with torch.no_grad():
        for module, delta in truth.items():
            plain.get_submodule(module).weight += delta
    torch.testing.assert_close(answer, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize(("variant", "word"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "biases")])
def test_what_does_not_add_up_is_refused(
    variant: dict[str, Any], word: str, add: Add, merge: Callable[..., Any], registry: AdapterRegistry
) -> None:
    add("a", seed=1, **variant)
    for method in METHODS:
        with pytest.raises(MergeError, match=f"{word}.*(Merge it into its base|Serve it by itself)"):
            merge(["a"], [1.0], method)
    assert registry.list("merged") == []


def test_different_bases_are_not_merged(
    add: Add, merge: Callable[..., Any], registry: AdapterRegistry, make_adapter: Any, tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    moved = tmp_path / "moved"
    shutil.copytree(tiny_base, moved, ignore=shutil.ignore_patterns(".fingerprint.json"))
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    add("a", seed=1)
    registry.add(make_adapter(seed=1), "b", base=ResolvedBase("moved", "moved", moved))
    with pytest.raises(BaseMismatchError, match=r"a:1 .*b:1 is for moved"):
        merge(["a", "b"])


def test_settings_that_make_no_sense_are_named(add: Add, merge: Callable[..., Any]) -> None:
    add("a", seed=1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"references": []}, "at least one"),
        ({"references": ["a"], "weights": [1.0, 2.0]}, "one weight for each"),
        ({"references": ["a"], "weights": [float("nan")]}, "finite"),
        ({"references": ["a"], "method": "tise"}, "Did you mean 'ties'"),
        ({"references": ["a"], "method": "ties", "density": 0.0}, "density"),
        ({"references": ["a"], "method": "svd", "rank": 0}, "rank of 1"),
        ({"references": ["a"], "rank": 4}, "method='svd'"),
        ({"references": ["nobody"]}, "no adapter"),
    ]
    for settings, words in wrong:
        with pytest.raises(UsageError, match=words):
            merge(**settings)
    with pytest.raises(MergeError, match="is zero"):
        merge(["a", "a"], [1.0, -1.0])


def test_a_rank_over_the_limit_is_refused_with_the_way_out(add: Add, merge: Callable[..., Any]) -> None:
    add("a", seed=1, rank=1000)
    with pytest.raises(MergeError, match="method='svd'"):
        merge(["a", "a"], [1.0, 1.0])
    assert merge(["a", "a"], [1.0, 1.0], "svd").relative_error < 1e-5
