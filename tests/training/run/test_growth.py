"""A run over rows of many lengths stays about as large as its first steps were, and as large as it was predicted to be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ROOT

PROGRAM = """
import json, random, sys
from datasets import Dataset
from transformers import TrainerCallback
from adapterhub_lite.bases import load_tokenizer, resolve_base
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

STEPS, ROWS, LONGEST = 24, 4, 96
folder, settings, chance = sys.argv[1], json.loads(sys.argv[2]), random.Random(0)
base = resolve_base("smollm2-135m").folder
end = load_tokenizer(base).eos_token_id

def row(length):
    ids = [*(chance.randint(10, 1000) for _ in range(length - 1)), end]
    return {"input_ids": ids, "labels": ids}

rows = []
for step in range(STEPS):
    # The longest batches come first, so that what grows afterwards is no batch.
    longest = LONGEST if step < 3 else chance.randint(20, LONGEST)
    rows += [row(longest) for _ in range(ROWS)] if step == 0 else [
        row(longest), *(row(chance.randint(12, longest)) for _ in range(ROWS - 1))]

class Peaks(TrainerCallback):
    peaks = []
    def on_step_end(self, args, state, control, **kwargs):
        self.peaks.append(trainer.meter.memory.peak_bytes())

args = AdapterTrainingArguments(
    output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS, show_progress=False, save_strategy="no",
    use_cpu=True, train_sampling_strategy="sequential", **settings)
trainer = AdapterTrainer(str(base), args, Dataset.from_list(rows), callbacks=[Peaks()])
trainer.train()
print(json.dumps({"peaks": Peaks.peaks, "predicted": trainer.memory_choice.uncorrected.total}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("settings", [{}, {"padding_free": False}], ids=["packed", "padded"])
def test_batches_of_many_lengths_do_not_make_a_run_grow(settings: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "run"), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    peaks = found["peaks"]
    # What the heap keeps between tensors of many sizes is left, and the code of the last products.
    assert peaks[-1] <= 1.1 * peaks[2], [peak >> 20 for peak in peaks]
    assert found["predicted"] == pytest.approx(peaks[-1], rel=0.12)
