"""What is lost where weights are trained in bf16 without fp32 copies for the optimizer?

The preset `full` for 300 steps of one row of the task sql, with `master_weights` and without: the held-out loss, and which
share of the weights has moved at all.

    python -m scripts.bench.train.master_weights 1e-5 masters    # one run, five minutes; each is kept at once
    python -m scripts.bench.train.master_weights 1e-5 none
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from adapterhub_lite.bases import load_base_model, resolve_base
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from scripts.bench.report import RESULTS, write_result
from scripts.bench.train.preset_loss import held_out_loss, table
from scripts.bench.train.train_step import BASE

NAME = "master_weights"
STEPS, TASK, HELD_OUT = 300, "sql", 48


def run(rate: float, *, masters: bool) -> dict[str, float]:
    """Train, and look at what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        args = AdapterTrainingArguments(
            output_dir=str(Path(folder) / "run"),
            memory_preset="full",
            master_weights=masters,
            max_steps=STEPS,
            per_device_train_batch_size=1,
            learning_rate=rate,
            seed=0,
            save_strategy="no",
            show_progress=False,
            preflight=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = AdapterTrainer(BASE, args, table(TASK, 0, "train", STEPS))
        trainer.train()
    before = dict(load_base_model(resolve_base(BASE).folder, dtype=torch.bfloat16).named_parameters())
    after = dict(trainer.model.named_parameters())
    moved = sum(int((after[name] != tensor).sum()) for name, tensor in before.items())
    rows = table(TASK, 0, "held-out", HELD_OUT)
    return {
        "held_out_loss": held_out_loss(trainer.model, rows, torch.bfloat16),
        "share_moved": moved / sum(tensor.numel() for tensor in before.values()),
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rate", help="learning rate, such as 1e-5")
    parser.add_argument("way", choices=("masters", "none"))
    given = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    found = run(float(given.rate), masters=given.way == "masters")
    rates = json.loads(path.read_bytes())["rates"] if path.exists() else {}
    rates.setdefault(given.rate, {})[given.way] = found
    print(given.rate, given.way, found)
    write_result(NAME, {"base": BASE, "preset": "full", "task": TASK, "steps": STEPS, "rows_a_step": 1, "rates": rates})


if __name__ == "__main__":
    main()
