"""Runs on the device that is rehearsed, or on the CPU: `python -m tests.rehearsal.training DEVICE BASE FOLDER CASE...`.

Prints as JSON, for each case, the losses, what the adapter came to, and for the device where the CPU waited for it in a step.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.rehearsal import device as rehearsal

CASES: dict[str, dict[str, Any]] = {
    "packed": {"memory_preset": "lora-fp32"},
    "padded": {"memory_preset": "lora-fp32", "padding_free": False},
    "packing": {"memory_preset": "lora-fp32", "packing": "bfd", "max_length": 64},
    "bf16": {"memory_preset": "lora-bf16"},
    "checkpointed": {"memory_preset": "lora-bf16-gc"},
    "tiles": {"memory_preset": "lora-fp32", "loss_backend": "tiled", "loss_chunk_tokens": 7},
    "head": {"memory_preset": "head-only"},
    "full": {"memory_preset": "full"},
    "accumulated": {"memory_preset": "lora-fp32", "gradient_accumulation_steps": 2},
}


def main(where: str, base: str, folder: str, *cases: str) -> None:
    """Train each case on the device or the CPU."""
    mode = rehearsal.install() if where == rehearsal.NAME else None
    if mode is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = rehearsal.NAME
        mode.__enter__()
    print(json.dumps({case: trained(mode, base, Path(folder) / case, CASES[case]) for case in cases}))


def trained(mode: rehearsal.Rehearsal | None, base: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train, save a checkpoint, go on from it, evaluate."""
    from transformers import TrainerCallback

    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
    from tests.training.conftest import LETTERS, chat

    rows = [chat(f"{LETTERS[i % 26]} times {i % 7 + 1}", LETTERS[i % 26] * (i % 7 + 1)) for i in range(24)]
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "rank": 4, "alpha": 8, "logging_steps": 1,
                "show_progress": False, "report_to": "none", "save_strategy": "steps", "save_steps": 2,
                "eval_strategy": "steps", "eval_steps": 4, "use_cpu": mode is None, **case}  # fmt: skip
    waits: Counter[str] = Counter()

    class Watch(TrainerCallback):
        """Counts the waits of a step, once the proofs of the first two are over."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Remember what there was."""
            self.before = Counter(mode.syncs) if mode else Counter()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            """Note what came in the third step."""
            if mode and state.global_step == 3:
                waits.update({f"{what} in {line}": count for (what, line), count in (mode.syncs - self.before).items()})

    def trainer(*callbacks: Any) -> Any:
        args = AdapterTrainingArguments(output_dir=str(folder / "run"), **settings)
        return AdapterTrainer(base, args, rows, eval_dataset=rows[:6], callbacks=list(callbacks))

    def sums(model: Any) -> dict[str, float]:
        return {n: float(p.detach().cpu().double().sum()) for n, p in model.named_parameters() if p.requires_grad}

    whole = trainer(Watch())
    whole.train()
    losses = [line[k] for line in whole.state.log_history for k in ("loss", "eval_loss") if k in line]
    if "lora" in case["memory_preset"]:
        whole.save_adapter(folder / "adapter")
    again = trainer()
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    devices = sorted({p.device.type for p in whole.model.parameters()})
    return {
        "losses": losses,
        "devices": devices,
        "trained": sums(whole.model),
        "resumed": sums(again.model),
        "waits": waits,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
