"""Which learning rate, alpha, LoRA+ ratio and checkpoint interval suit the example tasks: candidates for the defaults.

    python -m scripts.bench.train.defaults                 # about ten minutes on one quiet core, three times that with --steps 40
    python -m scripts.bench.train.defaults sql --steps 20  # one task, shorter runs

SmolLM2-135M-Instruct, LoRA of rank 8 on all linear layers, 8 rows per update, AdamW, cosine schedule. Each variant is one
run with one seed; the figure is the loss per token on rows of the task's held-out split, after the last step.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench.report import write_result

NAME = "training_defaults"
BASE = "smollm2-135m"
HELD_OUT = 48


@dataclass(frozen=True)
class Variant:
    """One combination of the settings that are compared."""

    learning_rate: float
    alpha: int = 16
    loraplus_lr_ratio: float | None = None


VARIANTS = (
    *(Variant(rate) for rate in (5e-4, 1e-3, 2e-3, 4e-3)),
    Variant(2e-3, alpha=8),
    Variant(1e-3, loraplus_lr_ratio=4.0),
)


def train_one(variant: Variant, task: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train one variant on `task`; returns its held-out loss and what a step and a checkpoint took (seconds)."""
    from adapterhub_lite.tasks import get_task
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    args = AdapterTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, save_strategy="no", seed=0, rank=8,
        show_progress=False, memory_preset="lora-bf16", use_cpu=True, preflight=False, **asdict(variant),
    )  # fmt: skip
    source = get_task(task)
    held_out = source.rows(HELD_OUT, split="held-out")
    trainer = AdapterTrainer(BASE, args, source.rows(steps * 8), held_out)
    began = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - began) / steps
    began = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    saving = time.perf_counter() - began
    return {
        **asdict(variant), "task": task, "steps": steps, "held_out_loss": trainer.evaluate()["eval_loss"],
        "step_seconds": seconds, "checkpoint_seconds": saving,
    }  # fmt: skip


def main() -> None:
    """Train every variant on every task and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=["sql", "event"])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    runs = []
    for variant in VARIANTS:
        for task in options.tasks:
            with tempfile.TemporaryDirectory() as scratch:
                runs.append(train_one(variant, task, options.steps, Path(scratch)))
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in runs[-1].items()})
            write_result(NAME, {"base": BASE, "held_out_rows": HELD_OUT, "runs": runs})


if __name__ == "__main__":
    main()
