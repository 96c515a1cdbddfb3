"""What does each preset need for Qwen2.5-1.5B and 7B at 1 x 1024 tokens, compared with the published figures?

The shapes alone are used: no weights. Each cell says in `source` where its `gb` comes from: `measured` (the allocator
of a GPU, in a run on random weights), `exact` (the whole step on fake tensors) or `estimate` (some layers on fake
tensors). Bytes are without Python's or CUDA's own overhead, as the allocator of a GPU counts them; 1 GB is 1e9 bytes.

    python -m scripts.bench.train.memory_table                            # estimates, a minute
    python -m scripts.bench.train.memory_table --exact --seconds 300      # and dry runs, as many as fit; call again to go on
    python -m scripts.bench.train.memory_table --measure                  # and runs on a GPU, 16 GB of random weights on disk
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from adapterhub_lite.memory import MEMORY_PRESETS, Machine, Workload, dry_run, refusal
from adapterhub_lite.memory.estimate import OVERHEAD_BYTES, ModelFacts, estimate
from scripts.bench.report import RESULTS, write_result
from scripts.bench.train.memory_accuracy import make_base, run_child
from scripts.gpu_check.sizes import SHAPES as QWEN

RANKS = (4, 8, 16, 32)
PUBLISHED_GB: dict[str, dict[str, Any]] = {
    "1.5B": {"full": 20.31, "lora": {4: 9.68, 8: 9.78, 16: 9.93, 32: 9.98}},
    "7B": {"full": 40.68, "lora": {4: 24.77, 8: 24.95, 16: 24.94, 32: 25.98}},
}
TOKENS = 1024
SHAPES = {size: QWEN[size] for size in PUBLISHED_GB}
COLOURS = {"measured": "tab:green", "exact": "tab:blue", "estimate": "tab:gray"}
# The presets that the published table has a figure for, or that have a goal: at each of its ranks, the others at 8.
EVERY_RANK = ("lora-bf16", "lora-bf16-gc", "qlora-nf4-gc")


def main() -> None:
    """Estimate the table, and write it as JSON after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no dry run or run after so long")
    parser.add_argument("--again", action="store_true", help="drop the dry runs and runs of earlier calls")
    arguments = parser.parse_args()
    from transformers import AutoConfig

    end = time.monotonic() + arguments.seconds
    path = RESULTS / "memory_table.json"
    kept = json.loads(path.read_text())["cells"] if path.exists() and not arguments.again else []
    facts = {size: ModelFacts(AutoConfig.for_model(**shape)) for size, shape in SHAPES.items()}
    combinations = [(name, rank) for name in MEMORY_PRESETS for rank in (RANKS if name in EVERY_RANK else (8,))]
    cells = [estimated_cell(facts[size], size, name, rank, kept) for size in SHAPES for name, rank in combinations]
    _write(cells)
    # What has a goal comes first.
    for cell in sorted(cells, key=lambda cell: cell["preset"] not in EVERY_RANK):
        single = MEMORY_PRESETS[cell["preset"]].strategy == "single"
        if arguments.exact and single and "exact_gb" not in cell and time.monotonic() < end:
            start = time.perf_counter()
            peak = dry_run(facts[cell["model"]].config, cell["preset"], _workload(cell)) - OVERHEAD_BYTES["cuda"]
            cell |= {"exact_gb": round(peak / 1e9, 2), "exact_seconds": round(time.perf_counter() - start, 1)}
            _write(cells)
    if arguments.measure:
        measure_cells(cells, end)


def _workload(cell: dict[str, Any]) -> Workload:
    return Workload(1, TOKENS, rank=cell["rank"] or 8, world_size=cell["world_size"], device="cuda")


def estimated_cell(facts: ModelFacts, size: str, name: str, rank: int, kept: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell of the table, with what earlier calls measured for it."""
    preset, published = MEMORY_PRESETS[name], PUBLISHED_GB[size]
    of_rank: Any = published["full"] if name == "full" else published["lora"]
    cell: dict[str, Any] = {
        "model": size,
        "preset": name,
        "rank": rank if preset.trains == "lora" else None,
        "world_size": 1 if preset.strategy == "single" else 2,
        "published_gb": of_rank if name == "full" else of_rank[rank] if name in ("lora-bf16", "lora-bf16-gc") else None,
    }
    found = estimate(facts, preset, _workload(cell))
    cell["estimate_gb"] = round((found.total - OVERHEAD_BYTES["cuda"]) / 1e9, 2)
    cell["components_gb"] = {k: round(v / 1e9, 3) for k, v in found.components.items() if k != "overhead"}
    same = [old for old in kept if all(old[key] == cell[key] for key in ("model", "preset", "rank"))]
    return cell | {key: old[key] for old in same for key in old if key.startswith(("exact_", "measured_"))}


def measure_cells(cells: list[dict[str, Any]], end: float) -> None:
    """Run what this GPU can run, and write each figure at once."""
    here = Machine.present()
    if here.device != "cuda":
        raise SystemExit("--measure needs a GPU, and there is none here.")
    with tempfile.TemporaryDirectory() as scratch:
        for size, shape in SHAPES.items():
            base = make_base(shape, Path(scratch) / size)
            for cell in (cell for cell in cells if cell["model"] == size and "measured_gb" not in cell):
                if refusal(MEMORY_PRESETS[cell["preset"]], here) is None and time.monotonic() < end:
                    run = run_child(Path(scratch), base, cell["preset"], TOKENS, rows=1, rank=cell["rank"] or 8)
                    cell["measured_gb"] = round(run["measured"] / 1e9, 2)
                    _write(cells)


def _write(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        cell["source"] = next(s for s in ("measured", "exact", "estimate") if f"{s}_gb" in cell)
        cell["gb"] = cell[f"{cell['source']}_gb"]
    payload = {"cells": cells, "wanted": goals_reached(cells), "published": PUBLISHED_GB, "tokens": f"1 x {TOKENS}"}
    write_result("memory_table", payload)
    _plot(cells)


def goals_reached(cells: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each goal is reached, by the best source that each cell has."""

    def of(model: str, preset: str) -> list[dict[str, Any]]:
        return [cell for cell in cells if (cell["model"], cell["preset"]) == (model, preset)]

    half = all(cell["gb"] <= cell["published_gb"] / 2 for cell in of("1.5B", "lora-bf16-gc"))
    return {
        "1.5B lora-bf16-gc at most half of the published cell at every rank": half,
        "7B lora-bf16-gc at most 17 GB": all(cell["gb"] <= 17 for cell in of("7B", "lora-bf16-gc")),
        "7B qlora-nf4-gc within 8 GiB": all(cell["gb"] <= 8 * 2**30 / 1e9 for cell in of("7B", "qlora-nf4-gc")),
    }


def _plot(cells: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5))
    for axis, size in zip(axes, SHAPES, strict=True):
        shown = [c for c in cells if c["model"] == size and c["rank"] in (8, None)]
        axis.barh([c["preset"] for c in shown], [c["gb"] for c in shown], color=[COLOURS[c["source"]] for c in shown])
        for row, cell in enumerate(shown):
            if cell["published_gb"]:
                axis.plot(cell["published_gb"], row, "k|", markersize=14, label="published" if row == 0 else None)
        axis.invert_yaxis()
        axis.set_title(f"Qwen2.5-{size}, 1 x {TOKENS} tokens, rank 8 (GB)")
        for source, colour in COLOURS.items():
            axis.barh([shown[0]["preset"]], [0], color=colour, label=source)
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "memory_table.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
