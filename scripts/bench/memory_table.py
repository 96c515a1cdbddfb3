"""What does each preset need for Qwen2.5-1.5B and 7B at 1 x 1024 tokens, beside the published figures?

The shapes alone are used: no weights. Each cell says where it comes from: `estimate` (two layers on fake tensors) or
`exact` (the whole step on fake tensors). Nothing here ran on a GPU. Bytes are without Python's or CUDA's own overhead,
as the allocator of a GPU would count them; 1 GB is 1e9 bytes.

    python -m scripts.bench.memory_table             # estimates, a minute
    python -m scripts.bench.memory_table --exact     # and dry runs, some minutes
"""

import argparse
import time
from typing import Any

from adapterhub_lite.memory import MEMORY_PRESETS, Workload, dry_run
from adapterhub_lite.memory.estimate import OVERHEAD_BYTES, ModelFacts, estimate
from scripts.bench.report import RESULTS, write_result

RANKS = (4, 8, 16, 32)
PUBLISHED_GB = {
    "1.5B": {"full": 20.31, "lora": {4: 9.68, 8: 9.78, 16: 9.93, 32: 9.98}},
    "7B": {"full": 40.68, "lora": {4: 24.77, 8: 24.95, 16: 24.94, 32: 25.98}},
}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
EXACT = ("full", "lora-bf16", "lora-bf16-gc", "qlora-nf4-gc")


def main() -> None:
    """Reckon the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    from transformers import AutoConfig

    cells = []
    for size, shape in SHAPES.items():
        config = AutoConfig.for_model("qwen2", **shape)
        facts = ModelFacts(config)
        for name, preset in MEMORY_PRESETS.items():
            for rank in RANKS if preset.name in EXACT and preset.trains == "lora" else (8,):
                ranks = 1 if preset.strategy == "single" else 2
                workload = Workload(1, 1024, rank=rank, world_size=ranks, device="cuda")
                reckoned = estimate(facts, preset, workload)
                cell: dict[str, Any] = {
                    "model": size,
                    "preset": name,
                    "rank": rank if preset.trains == "lora" else None,
                    "world_size": ranks,
                    "source": "estimate",
                    "gb": round((reckoned.total - OVERHEAD_BYTES["cuda"]) / 1e9, 2),
                    "components_gb": {k: round(v / 1e9, 3) for k, v in reckoned.components.items() if k != "overhead"},
                    "published_gb": _published(size, name, rank),
                }
                if arguments.exact and name in EXACT and rank == 8:
                    start = time.perf_counter()
                    peak = dry_run(config, preset, workload) - OVERHEAD_BYTES["cuda"]
                    cell |= {"exact_gb": round(peak / 1e9, 2), "exact_seconds": round(time.perf_counter() - start, 1)}
                cells.append(cell)
                print(size, name, rank, cell["gb"], cell.get("exact_gb", ""), cell["published_gb"] or "", flush=True)
    print(write_result("memory_table", {"cells": cells, "published": PUBLISHED_GB, "tokens": "1 x 1024"}))
    _plot(cells)


def _published(size: str, preset: str, rank: int) -> float | None:
    known: Any = PUBLISHED_GB[size]
    if preset == "full":
        return float(known["full"])
    return float(known["lora"][rank]) if preset in ("lora-bf16", "lora-bf16-gc") else None


def _plot(cells: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5))
    for axis, size in zip(axes, SHAPES, strict=True):
        shown = [c for c in cells if c["model"] == size and c["rank"] in (8, None)]
        axis.barh([c["preset"] for c in shown], [c["gb"] for c in shown], label="predicted")
        for row, cell in enumerate(shown):
            if cell["published_gb"]:
                axis.plot(cell["published_gb"], row, "k|", markersize=14, label="published" if row == 0 else None)
        axis.invert_yaxis()
        axis.set_title(f"Qwen2.5-{size}, 1 x 1024 tokens, rank 8 (GB)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "memory_table.png", dpi=110)


if __name__ == "__main__":
    main()
