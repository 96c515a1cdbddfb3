"""How near is the predicted memory of a run to what the run measures, per preset, family and length?

Each run is a process of its own: the embedded base or a model of random weights, the trainer, two steps, and the peak
of resident memory (on a GPU: of the allocator), compared with what the trainer predicted without calibration; then once
more with the calibration that the other runs of its preset would have left.

    python -m scripts.bench.train.memory_accuracy smollm2-135m            # every preset that runs here; minutes per shape
    python -m scripts.bench.train.memory_accuracy qwen2.5-0.5b --presets lora-bf16 lora-bf16-gc --lengths 128
    python -m scripts.bench.train.memory_accuracy gemma-3-270m --seconds 300    # as much as fits; call again to go on

Every run is kept at once, and is not measured again unless `--again` is given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapterhub_lite.bases import load_tokenizer, resolve_base
from scripts.bench.report import RESULTS, write_result

LENGTHS = (128, 256, 512)
ROWS = 2
PRESETS = (
    "full", "head-only", "lora-fp32", "lora-fp16", "lora-bf16", "lora-bf16-gc", "lora-int8", "qlora-nf4",
    "qlora-nf4-gc", "qlora-nf4-paged",
)  # fmt: skip
EMBEDDED = "smollm2-135m"
SHAPES: dict[str, dict[str, Any]] = {
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


def make_base(shape: dict[str, Any] | None, folder: Path) -> Path:
    """Random weights of `shape` in bf16 with a tokenizer of two words, or the embedded base; returns its folder."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if shape is None:
        return resolve_base(EMBEDDED).folder
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    special = {"pad_token": "a", "eos_token": "b"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def measure(folder: str, preset: str, length: int, rows_a_step: int, rank: int, output: str) -> None:
    """The child: train two steps under a preset, and print what the trainer predicted and what it measured."""
    from datasets import Dataset

    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    arguments = AdapterTrainingArguments(
        output_dir=output,
        memory_preset=preset,
        per_device_train_batch_size=rows_a_step,
        rank=rank,
        max_steps=2,
        max_length=length,
        show_progress=False,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    # Without an end token the trainer refuses the rows.
    end = load_tokenizer(folder).eos_token_id
    ids = [[*torch.randint(10, 1000, (length - 1,)).tolist(), end] for _ in range(2 * rows_a_step)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = AdapterTrainer(folder, arguments, rows)
    trainer.train()
    predicted = trainer.memory_choice.uncorrected
    assert predicted is not None
    peak = trainer.meter.memory.peak_bytes()
    print(json.dumps({"predicted": predicted.total, "components": predicted.components, "measured": peak}))


def run_child(
    scratch: Path, base: Path, preset: str, length: int, *, rows: int = ROWS, rank: int = 8
) -> dict[str, Any]:
    """Measure one combination in a process and a home of its own.

    Raises:
        RuntimeError: the child failed; the text is its last line.
    """
    output = scratch / f"{preset}-{length}"
    command = [sys.executable, "-W", "ignore", "-m", "scripts.bench.train.memory_accuracy", "--child"]
    command += [str(base), preset, str(length), str(rows), str(rank), str(output / "run")]
    environment = {**os.environ, "ADAPTERHUB_HOME": str(output)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(output, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    run: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    run["error"] = round(run["predicted"] / run["measured"] - 1, 4)
    return run


def main() -> None:
    """Run each preset in a child process and compare its peak with the prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=[EMBEDDED, *SHAPES], default=EMBEDDED)
    parser.add_argument("--presets", nargs="*", choices=PRESETS, help="those that run here when not given")
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens per row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        base, preset, length, rows, rank, output = arguments.child
        measure(base, preset, int(length), int(rows), int(rank), output)
        return
    from adapterhub_lite.memory import MEMORY_PRESETS, Machine, refusal

    end = time.monotonic() + arguments.seconds
    here = Machine.present()
    skipped = {name: why for name in PRESETS if (why := refusal(MEMORY_PRESETS[name], here))}
    presets = arguments.presets or [name for name in PRESETS if name not in skipped]
    path = RESULTS / "memory_accuracy.json"
    found: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    missing = [(preset, length) for preset in presets for length in arguments.lengths]
    if not arguments.again:
        missing = [
            (preset, length) for preset, length in missing if f"{arguments.shape}:{preset}:{length}" not in found
        ]
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(SHAPES.get(arguments.shape), Path(scratch) / "base") if missing else Path()
        for preset, length in missing:
            if time.monotonic() > end:
                print("stopped for the time; call again to go on")
                break
            run = run_child(Path(scratch), base, preset, length)
            print(
                arguments.shape, preset, length, f"{run['measured'] / 1e6:.0f} MB", f"{run['error']:+.1%}", flush=True
            )
            found[f"{arguments.shape}:{preset}:{length}"] = run
            write(found, skipped)
    draw(found)


def write(found: dict[str, Any], skipped: dict[str, str]) -> None:
    """Write all runs with their errors, and the summary of these."""
    for name, run in found.items():
        run["error_calibrated"] = error_when_calibrated(name, found)
    errors = [abs(run["error"]) for run in found.values()]
    after = [abs(run["error_calibrated"]) for run in found.values() if run["error_calibrated"] is not None]
    summary = {
        "runs": len(errors),
        "within_10_percent": sum(error <= 0.1 for error in errors),
        "median_error": median(errors),
        "worst_error": max(errors),
        "worst_calibrated": max(after, default=None),
    }
    payload = {"rows_a_step": ROWS, "summary": summary, "skipped": skipped, "runs": found}
    write_result("memory_accuracy", payload)


def draw(found: dict[str, Any]) -> None:
    """Predicted against measured, one point per run, with 10 % either way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for shape, marker in zip([EMBEDDED, *SHAPES], "osd", strict=True):
        runs = [run for name, run in found.items() if name.startswith(shape)]
        measured, predicted = ([run[key] / 1e9 for run in runs] for key in ("measured", "predicted"))
        axis.scatter(measured, predicted, marker=marker, s=22, label=shape)
    most = max((run["measured"] for run in found.values()), default=1e9) / 1e9 * 1.1
    axis.plot([0, most], [0, most], color="black", linewidth=1)
    axis.fill_between([0, most], [0, most * 0.9], [0, most * 1.1], alpha=0.15, color="black", label="within 10 %")
    axis.set_xlabel("measured peak of the run (GB)")
    axis.set_ylabel("predicted before it (GB)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "memory_accuracy.png", dpi=110)


def error_when_calibrated(name: str, found: dict[str, Any]) -> float | None:
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
