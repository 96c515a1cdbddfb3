"""How far is a merge from the exact weighted sum, ours and PEFT's? Writes results/merging.json and .png.

    python -m scripts.bench.keep.merging

Same adapters, same weights, both in one run; the truth is the sum of the deltas that PEFT applies for each adapter
alone, in fp64. Also what rounding to bf16 costs of a delta when it is merged into the base, and the seconds each takes.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import MergeError
from adapterhub_lite.merging import merge_adapters, merge_into_base
from adapterhub_lite.registry import AdapterRegistry
from scripts.bench.report import RESULTS, write_result

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Deltas = dict[str, torch.Tensor]
CASES: list[tuple[str, list[dict[str, Any]], list[float]]] = [
    ("two plain, 0.7 / 0.3", [{}, {}], [0.7, 0.3]),
    ("two plain, 1 / -1", [{}, {}], [1.0, -1.0]),
    ("one plain, 1", [{}], [1.0]),
    ("one rsLoRA, 1", [{"use_rslora": True}], [1.0]),
    ("ranks 4 and 16, 0.5 / 0.5", [{"r": 4}, {"r": 16}], [0.5, 0.5]),
    ("one with LoRA bias, 1", [{"lora_bias": True}], [1.0]),
    ("one DoRA, 1", [{"use_dora": True}], [1.0]),
]
METHODS = ("cat", "svd", "linear", "ties", "dare_ties")


def make_base(folder: Path) -> ResolvedBase:
    """A random Llama of 4 layers, hidden 256."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    config = LlamaConfig(vocab_size=512, num_key_value_heads=4, attention_bias=True, mlp_bias=True, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return ResolvedBase("random-llama", "random-llama", folder)


def make_adapter(base: ResolvedBase, folder: Path, seed: int, **lora: Any) -> Path:
    """A LoRA with random B."""
    torch.manual_seed(seed)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            if "magnitude" in name:
                # As trained as the rest: fresh magnitudes are those of the base and hide that they were dropped.
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return folder


def effect(model: Any, adapter: str) -> Deltas:
    """What an adapter does to each module: its answer to the identity less the base's; biases and DoRA included."""
    model.set_adapter(adapter)
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and adapter in module.lora_A:
                inputs = torch.cat([torch.eye(module.in_features), torch.zeros(1, module.in_features)])
                found[name] = (module(inputs) - module.base_layer(inputs)).double()
    return found


def distance(found: Deltas, wanted: Deltas) -> float:
    """Relative Frobenius distance over all modules."""
    wrong = sum(float((found[m] - wanted[m]).square().sum()) for m in wanted)
    return (wrong / sum(float(wanted[m].square().sum()) for m in wanted)) ** 0.5


def compare(base: ResolvedBase, folders: list[Path], weights: list[float], scratch: Path) -> dict[str, Any]:
    """Errors of every method, ours and PEFT's, against the exact sum."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.folder), folders[0], adapter_name="a0")
    for index, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{index}")
    names = [f"a{index}" for index in range(len(folders))]
    effects = [effect(model, name) for name in names]
    truth = {
        m: sum((w * e[m] for w, e in zip(weights, effects, strict=True)), start=0 * effects[0][m]) for m in effects[0]
    }
    found: dict[str, Any] = {}
    for method in METHODS:
        found[method] = {"peft": _peft(model, names, weights, method, truth)}
        registry = AdapterRegistry(scratch / method)
        added = [registry.add(folder, f"p{i}", base=base).reference for i, folder in enumerate(folders)]
        start = time.perf_counter()
        try:
            merged = merge_adapters(added, weights, method, registry=registry, base=base)  # type: ignore[arg-type]
        except MergeError as error:
            found[method]["ours"] = "refused: " + str(error)
            continue
        seconds = time.perf_counter() - start
        ours = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base.folder),
            registry.export(merged.manifest.reference, scratch / f"{method}-out"),
            adapter_name="ours",
        )
        found[method]["ours"] = distance(effect(ours, "ours"), truth)
        found[method]["ours_receipt"] = merged.relative_error
        found[method]["ours_seconds"] = round(seconds, 3)
    return found


def _peft(model: Any, names: list[str], weights: list[float], method: str, truth: Deltas) -> float | str:
    kind = {"ties": "ties_svd", "dare_ties": "dare_ties_svd"}.get(method, method)
    options: dict[str, Any] = {"density": 0.5} if "ties" in method else {}
    if "svd" in kind:
        # The same room as ours takes by default: the sum of the ranks.
        options["svd_rank"] = sum(model.peft_config[name].r for name in names)
    try:
        model.add_weighted_adapter(names, weights, f"merged_{method}", combination_type=kind, **options)
        return distance(effect(model, f"merged_{method}"), truth)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def into_base(base: ResolvedBase, folder: Path, scratch: Path) -> dict[str, Any]:
    """What is left of a delta after merging, by dtype."""
    registry = AdapterRegistry(scratch / "into")
    registry.add(folder, "a", base=base)
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        start = time.perf_counter()
        merged = merge_into_base("a", scratch / dtype, dtype, registry=registry, base=base)
        found[dtype] = {"lost_of_delta": merged.relative_error, "seconds": round(time.perf_counter() - start, 3)}
    return found


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Errors of cat and svd and linear, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4.5))
    cases = list(found)
    for offset, (method, who) in enumerate((m, w) for m in ("cat", "svd", "linear") for w in ("peft", "ours")):
        values = [found[case][method].get(who) for case in cases]
        heights = [max(v, 1e-9) if isinstance(v, float) else 0 for v in values]
        axes.bar([i + offset * 0.13 for i in range(len(cases))], heights, 0.13, label=f"{who} {method}")
    axes.set_xticks([i + 0.3 for i in range(len(cases))], cases, rotation=15, ha="right")
    axes.set(
        yscale="log",
        ylabel="relative error",
        title="distance from the exact weighted sum (no bar: refused)",
        ylim=(5e-10, 5e3),
    )
    axes.legend(ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make base and adapters in a scratch folder, compare, write."""
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = make_base(scratch / "base")
        for number, (case, adapters, weights) in enumerate(CASES):
            folder = scratch / str(number)
            made = [make_adapter(base, folder / f"a{i}", i, **lora) for i, lora in enumerate(adapters)]
            found[case] = compare(base, made, weights, folder)
        merged = into_base(base, scratch / "0" / "a0", scratch)
    print(write_result("merging", {"relative_error": found, "into_base": merged}))
    plot(found, RESULTS / "merging.png")


if __name__ == "__main__":
    main()
