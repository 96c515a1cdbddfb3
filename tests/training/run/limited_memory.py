"""A run of its own in a process whose address space ends `spare` bytes above what it has once the model is there.

python limited_memory.py BASE OUTPUT SPARE stop|replan
"""

import json
import resource
import sys
from pathlib import Path

# What the run would load late, by which time there may be no room to map it.
import matplotlib.backends.backend_agg  # noqa: F401
import numpy as np
import torch
from datasets import Dataset

from adapterhub_lite.errors import OutOfMemoryError
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

ROWS, TOKENS = 128, 400


def main() -> None:
    """Train three steps, and print what became of them as one JSON line."""
    base, output, spare, when = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    ids = [[3 + (7 * i + j) % 250 for j in range(TOKENS)] for i in range(ROWS)]
    arguments = AdapterTrainingArguments(
        output_dir=output, memory_preset="lora-fp32", per_device_train_batch_size=ROWS, max_steps=3, rank=4,
        max_length=TOKENS, show_progress=False, use_cpu=True, proof=False, on_out_of_memory=when,
    )  # fmt: skip
    trainer = AdapterTrainer(base, arguments, Dataset.from_dict({"input_ids": ids, "labels": ids}))
    if spare:
        # OpenBLAS takes its buffers at the first product, and ends the process when it cannot.
        np.ones((64, 64)) @ np.ones((64, 64))
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + spare, held + spare))
    try:
        trainer.train()
        error = None
    except OutOfMemoryError as caught:
        error = str(caught)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    rows, times = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    reasons = trainer.memory_choice.reasons
    print(json.dumps({"error": error, "rows": rows, "times": times, "losses": losses, "reasons": reasons}))


if __name__ == "__main__":
    main()
