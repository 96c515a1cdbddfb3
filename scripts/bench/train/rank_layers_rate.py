"""What rank, which layers, which learning rate: every combination of a few, on the example tasks.

    python -m scripts.bench.train.rank_layers_rate             # half an hour on one core
    python -m scripts.bench.train.rank_layers_rate sql         # one task; a run that was stopped goes on

SmolLM2-135M-Instruct in bfloat16, alpha twice the rank, 8 rows per update, AdamW, cosine schedule, one seed. The figures are
the loss per token on rows of the task's held-out split after the last step, and the parameters that were trained.
Writes results/rank_layers_rate.json and its plot.
"""

import argparse
import itertools
import json
import tempfile
from typing import Any

from scripts.bench.report import RESULTS, write_result

NAME = "rank_layers_rate"
BASE = "smollm2-135m"
HELD_OUT = 48
RANKS = (2, 8, 32)
RATES = (5e-4, 2e-3, 8e-3)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = {
    "query and value": ("q_proj", "v_proj"),
    "attention": ATTENTION,
    "MLP": ("gate_proj", "up_proj", "down_proj"),
    "all linear": (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
}


def train_one(task: str, layers: str, rank: int, rate: float, steps: int) -> dict[str, Any]:
    """Train one combination; returns it with its held-out loss and the number of parameters trained."""
    from adapterhub_lite.tasks import get_task
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = AdapterTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8, save_strategy="no", seed=0, rank=rank,
            alpha=2 * rank, target_modules=list(LAYERS[layers]), learning_rate=rate, show_progress=False,
            memory_preset="lora-bf16", use_cpu=True, preflight=False,
        )  # fmt: skip
        source = get_task(task)
        trainer = AdapterTrainer(BASE, args, source.rows(steps * 8), source.rows(HELD_OUT, split="held-out"))
        trainer.train()
        return {
            "task": task, "layers": layers, "rank": rank, "learning_rate": rate, "steps": steps,
            "held_out_loss": trainer.evaluate()["eval_loss"],
            "parameters": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        }  # fmt: skip


def plot(runs: list[dict[str, Any]]) -> None:
    """Held-out loss over trained parameters: one panel a task, one colour for the layers, the best rate of each rank."""
    import matplotlib.pyplot as plt

    tasks = sorted({run["task"] for run in runs})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    for panel, task in zip(axes[0], tasks, strict=True):
        for layers in LAYERS:
            own = [
                min((r for r in runs if (r["task"], r["layers"], r["rank"]) == (task, layers, rank)), key=_loss)
                for rank in RANKS
            ]
            panel.plot([r["parameters"] for r in own], [_loss(r) for r in own], marker="o", label=layers)
            for run in own:
                panel.annotate(str(run["rank"]), (run["parameters"], _loss(run)), fontsize=7)
        panel.set(xscale="log", yscale="log", title=task, xlabel="parameters trained (the rank beside each)")
        panel.set_ylabel("held-out loss per token")
    axes[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{NAME}.png", dpi=110)


def _loss(run: dict[str, Any]) -> float:
    return float(run["held_out_loss"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By task: the best loss for each kind of layers and rank over the rates, and the rate that gave it."""
    found: dict[str, Any] = {}
    for run in sorted(runs, key=_loss):
        place = found.setdefault(run["task"], {}).setdefault(run["layers"].replace(" ", "_"), {})
        place.setdefault(f"rank_{run['rank']}", {k: run[k] for k in ("held_out_loss", "learning_rate", "parameters")})
    return found


def main() -> None:
    """Train every combination that is not there yet, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["sql", "event"])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {(run["task"], run["layers"], run["rank"], run["learning_rate"], run["steps"]) for run in runs}
    for task, layers, rank, rate in itertools.product(options.tasks, LAYERS, RANKS, RATES):
        if (task, layers, rank, rate, options.steps) in done:
            continue
        runs.append(train_one(task, layers, rank, rate, options.steps))
        print(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in runs[-1].items()}, flush=True
        )
        payload = {"base": BASE, "held_out_rows": HELD_OUT, "steps": options.steps, "best": summary(runs), "runs": runs}
        write_result(NAME, payload)
    plot(runs)


if __name__ == "__main__":
    main()
