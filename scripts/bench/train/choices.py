"""Which rank, which layers and which learning rate: held-out loss on an example task, and how many parameters it took.

    python -m scripts.bench.train.choices --seconds 240    # goes on where it stopped; run it until it says that all is there
    python -m scripts.bench.train.choices --plot           # only draw what is there

SmolLM2-135M-Instruct, 8 rows per update, cosine schedule, one seed, alpha twice the rank. A point is one run; the figure is the
loss per token on held-out rows after the last step. Points of other settings of the run are measured anew.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench.report import RESULTS, write_result

NAME = "training_choices"
BASE, ROWS, HELD_OUT = "smollm2-135m", 8, 32
RANKS, LAYERS, RATES = (2, 8, 32), ("attention", "mlp", "all-linear"), (1e-3, 4e-3)


@dataclass(frozen=True)
class Point:
    """One run."""

    rank: int
    layers: str
    rate: float


def measure(point: Point, task: str, steps: int) -> dict[str, Any]:
    """Train one point; returns its held-out loss and its trained parameters."""
    from adapterhub_lite.tasks import get_task
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    source = get_task(task)
    with tempfile.TemporaryDirectory() as scratch:
        args = AdapterTrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=ROWS, save_strategy="no", seed=0,
            rank=point.rank, target_modules=point.layers, learning_rate=point.rate, show_progress=False,
            memory_preset="lora-bf16", use_cpu=True, preflight=False,
        )  # fmt: skip
        trainer = AdapterTrainer(BASE, args, source.rows(steps * ROWS), source.rows(HELD_OUT, split="held-out"))
        trainer.train()
        trained = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
        loss = trainer.evaluate()["eval_loss"]
    return {**asdict(point), "task": task, "steps": steps, "trained_parameters": trained, "held_out_loss": loss}


def measured_before(task: str, steps: int) -> list[dict[str, Any]]:
    """The points of an earlier call with the same task and steps."""
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text())["points"] if path.exists() else []
    return [one for one in found if (one["task"], one["steps"]) == (task, steps)]


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """For each rank and kind of layers the best loss over the rates."""
    best: dict[str, dict[str, Any]] = {}
    for one in points:
        key = f"{one['layers']}-{one['rank']}"
        if key not in best or one["held_out_loss"] < best[key]["held_out_loss"]:
            best[key] = {name: one[name] for name in ("held_out_loss", "rate", "trained_parameters")}
    return best


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Loss over trained parameters, a line for each kind of layers, at its best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    found = summary(points)
    for layers in LAYERS:
        line = [found[f"{layers}-{rank}"] for rank in RANKS if f"{layers}-{rank}" in found]
        counts, losses = [one["trained_parameters"] for one in line], [one["held_out_loss"] for one in line]
        axes.plot(counts, losses, marker="o", label=f"{layers}, ranks {', '.join(map(str, RANKS))}")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("loss on held-out rows")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure points until the time is up, writing each at once; then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sql")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no point after so long")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    points, began = measured_before(options.task, options.steps), time.monotonic()
    done = {Point(one["rank"], one["layers"], one["rate"]) for one in points}
    # One rate first: every kind of layers at the middle rank, and every rank on all layers.
    wanted = sorted(
        itertools.product(RANKS, LAYERS, RATES),
        key=lambda one: (one[2] != RATES[1], one[0] != 8 and one[1] != "all-linear", one),
    )
    for point in (Point(*one) for one in wanted):
        if point in done or options.plot or time.monotonic() - began > options.seconds:
            continue
        points.append(measure(point, options.task, options.steps))
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in points[-1].items()})
        payload = {"base": BASE, "rows_a_step": ROWS, "held_out_rows": HELD_OUT, "points": points}
        write_result(NAME, {**payload, "best": summary(points), "complete": len(points) == len(wanted)})
    plot(points, RESULTS / f"{NAME}.png")
    print(f"{len(points)} of {len(wanted)} points are there.")


if __name__ == "__main__":
    main()
