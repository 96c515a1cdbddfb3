"""How fast, and with how much memory, is each hostile adapter refused? Writes results/hostile.json and .png.

    python -m scripts.bench.keep.hostile

Each case of tests/registry/hostile is refused in a forked process of its own, so that its peak resident memory over
what the process began with is its own. Wanted: under 1 s and 64 MiB each.
"""

import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.operations.intake import import_adapter
from scripts.bench.report import RESULTS, write_result
from tests.registry.hostile.case import Case
from tests.registry.hostile.corpus import CASES


def make_sound(scratch: Path) -> tuple[ResolvedBase, Path, Path]:
    """A tiny base, a sound adapter for it, and the same as it is published."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=272, num_key_value_heads=2, tie_word_embeddings=True, **shape))
    model.save_pretrained(scratch / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(str(scratch / "adapter"))
    base = ResolvedBase("tiny", "tiny", scratch / "base")
    registry = AdapterRegistry(scratch / "elsewhere")
    registry.add(scratch / "adapter", "sql", base=base)
    return base, scratch / "adapter", registry.export("sql", scratch / "parcel")


def refuse(case: Case, folder: Path, home: Path, base: ResolvedBase) -> dict[str, Any]:
    """Refuse one case in a child; seconds and bytes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        registry = AdapterRegistry(home)
        before = _resident()
        start = time.perf_counter()
        try:
            if case.door == "add":
                registry.add(folder, "sql", base=base)
            else:
                import_adapter(registry.store, folder, base=base, name="sql")
            reason = None
        except AdapterHubError as error:
            reason = str(error)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"seconds": round(seconds, 4), "peak_bytes": max(0, peak - before), "reason": (reason or "")[:300]}
        os.write(writing, json.dumps({**found, "refused": reason is not None}).encode())
        os._exit(0)
    os.close(writing)
    content = b""
    while block := os.read(reading, 1 << 16):
        content += block
    os.close(reading)
    os.waitpid(child, 0)
    return dict(json.loads(content))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """One dot a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.scatter([f["seconds"] for f in found.values()], [f["peak_bytes"] / 2**20 + 0.01 for f in found.values()], s=14)
    axes.axvline(1.0, color="red")
    axes.axhline(64.0, color="red")
    axes.set(xscale="log", yscale="log", xlabel="seconds to refuse", ylabel="MiB over the start",
             title=f"{len(found)} hostile adapters; red: the budget")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Refuse every case once, in a scratch folder."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, adapter, parcel = make_sound(scratch)
        assert base.fingerprint
        AdapterRegistry(scratch / "warm").add(adapter, "sql", base=base)
        for index, case in enumerate(CASES):
            folder = scratch / f"case-{index}"
            shutil.copytree(adapter if case.door == "add" else parcel, folder)
            case.spoil(folder)
            found[case.name] = refuse(case, folder, scratch / f"home-{index}", base)
            shutil.rmtree(folder)
    summary = {
        "cases": len(found),
        "refused": sum(f["refused"] for f in found.values()),
        "slowest_seconds": max(f["seconds"] for f in found.values()),
        "largest_peak_bytes": max(f["peak_bytes"] for f in found.values()),
    }
    print(summary, write_result("hostile", {"summary": summary, "cases": found}))
    plot(found, RESULTS / "hostile.png")


if __name__ == "__main__":
    main()
