"""How near is the predicted memory of a run to what the run measures, per preset, family and length?

Each run is a process of its own: a model of random weights (or the embedded base), the trainer, two steps, and the
peak of resident memory (on a GPU: of the allocator), beside what the trainer predicted without any calibration; then
once more with the calibration that the other runs of its preset would have left.

    python -m scripts.bench.memory_accuracy smollm2-135m            # every preset that runs here; a few minutes a shape
    python -m scripts.bench.memory_accuracy qwen2.5-0.5b --presets lora-bf16 lora-bf16-gc --lengths 128

Results of several calls are merged.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scripts.bench.report import RESULTS, write_result

LENGTHS = (128, 256, 512)
ROWS = 2
PRESETS = (
    "full", "head-only", "lora-fp32", "lora-fp16", "lora-bf16", "lora-bf16-gc", "lora-int8", "qlora-nf4",
    "qlora-nf4-gc", "qlora-nf4-paged",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def make_base(shape: str, folder: Path) -> None:
    """Random weights of `shape` in bf16, and a tokenizer of two words, because the trainer wants one."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    special = {"pad_token": "a", "eos_token": "b"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def measure(folder: str, preset: str, length: int) -> None:
    """The child: train two steps under a preset, and print what the trainer predicted before beside what it measured."""
    from datasets import Dataset

    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    arguments = AdapterTrainingArguments(
        output_dir=folder + "/run",
        memory_preset=preset,
        per_device_train_batch_size=ROWS,
        max_steps=2,
        max_length=length,
        show_progress=False,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    # The last token is the tokenizer's end token: without one, the trainer refuses the rows.
    ids = [[*torch.randint(10, 1000, (length - 1,)).tolist(), 1] for _ in range(2 * ROWS)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = AdapterTrainer(folder, arguments, rows)
    trainer.train()
    predicted = trainer.memory_choice.uncorrected
    assert predicted is not None
    peak = trainer.meter.memory.peak_bytes()
    print(json.dumps({"predicted": predicted.total, "components": predicted.components, "measured": peak}))


def run_all(scratch: Path, shape: str, presets: list[str], lengths: list[int]) -> dict[str, Any]:
    """Measure every combination in a process and a home of its own."""
    make_base(shape, scratch / "base")
    found: dict[str, Any] = {}
    for preset in presets:
        for length in lengths:
            command = [sys.executable, "-W", "ignore", "-m", "scripts.bench.memory_accuracy", "--child"]
            command += [str(scratch / "base"), preset, str(length)]
            environment = {**os.environ, "ADAPTERHUB_HOME": str(scratch / f"home-{preset}-{length}")}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            shutil.rmtree(scratch / "base" / "run", ignore_errors=True)
            if done.returncode:
                print(shape, preset, length, "failed:", done.stderr.strip().splitlines()[-1])
                continue
            run = json.loads(done.stdout.strip().splitlines()[-1])
            run["error"] = round(run["predicted"] / run["measured"] - 1, 4)
            found[f"{shape}:{preset}:{length}"] = run
            print(shape, preset, length, f"{run['measured'] / 1e6:.0f} MB, predicted {run['error']:+.1%}", flush=True)
    return found


def main() -> None:
    """Run each preset in a child process and set its peak beside the prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--presets", nargs="*", help="those that run here when not given")
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens a row")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    from adapterhub_lite.memory import MEMORY_PRESETS, Machine, refusal

    here = Machine.present()
    skipped = {name: why for name in PRESETS if (why := refusal(MEMORY_PRESETS[name], here))}
    presets = arguments.presets or [name for name in PRESETS if name not in skipped]
    path = RESULTS / "memory_accuracy.json"
    found: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        found |= run_all(Path(scratch), arguments.shape, presets, arguments.lengths)
    for name, run in found.items():
        run["error_calibrated"] = _left_out(name, found)
    errors = [abs(run["error"]) for run in found.values()]
    after = [abs(run["error_calibrated"]) for run in found.values() if run["error_calibrated"] is not None]
    summary = {"median_error": median(errors), "worst_error": max(errors), "worst_calibrated": max(after, default=None)}
    print(summary)
    payload = {"rows_a_step": ROWS, "summary": summary, "skipped": skipped, "runs": found}
    print(write_result("memory_accuracy", payload))


def _left_out(name: str, found: dict[str, Any]) -> float | None:
    """The error when this machine has seen the other runs of the same preset, and not this one."""
    from adapterhub_lite.memory import MemoryEstimate, Workload, calibrated, record_peak

    preset = name.split(":")[1]

    def estimate(run: dict[str, Any]) -> MemoryEstimate:
        return MemoryEstimate(preset, Workload(ROWS, 1), run["components"])

    others = [run for other, run in found.items() if other != name and other.split(":")[1] == preset]
    if not others:
        return None
    with tempfile.TemporaryDirectory() as home:
        for run in others:
            record_peak(estimate(run), run["measured"], home=home)
        corrected = calibrated(estimate(found[name]), home=home)
    return round(corrected.total / float(found[name]["measured"]) - 1, 4)


if __name__ == "__main__":
    main()
