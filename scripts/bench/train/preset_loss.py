"""Does every memory preset of one device learn what HF Trainer with PEFT learns, with the same masters?

Held-out loss after a few steps on the two example tasks, far from nothing left to learn: ours under each preset, and HF
Trainer on the same rows in the same order, with the same beginning. What HF trains whole is in fp32 under bf16 autocast.

    python -m scripts.bench.train.preset_loss                 # 16 runs per task and seed, ten seconds each
    python -m scripts.bench.train.preset_loss --seconds 400   # as many as fit; call again to go on

Every run is kept at once in results/preset_loss.json, and not made again unless it is taken out of the file.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.memory import MEMORY_PRESETS, prepare_for_training
from adapterhub_lite.tasks import TASKS, get_task
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import tokenize_rows
from scripts.bench.report import RESULTS, write_result
from scripts.bench.train.train_step import BASE

NAME = "preset_loss"
STEPS, ROWS, HELD_OUT = 12, 3, 24
# Each with the preset whose run under HF it is compared with: recomputing activations changes nothing there.
PRESETS = {
    "lora-bf16": "lora-bf16",
    "full": "full",
    "qlora-nf4": "qlora-nf4",
    "lora-int8": "lora-int8",
    "lora-fp32": "lora-fp32",
    "head-only": "head-only",
    "qlora-nf4-paged": "qlora-nf4-paged",
    "lora-bf16-gc": "lora-bf16",
    "qlora-nf4-gc": "qlora-nf4",
}
RATES = {"all": 2e-5, "head": 2e-4, "lora": 1e-3}


def arguments(preset: str, seed: int, folder: str) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": RATES[MEMORY_PRESETS[preset].trains],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
    }


def table(task: str, seed: int, split: Any, count: int) -> Any:
    """Tokenised rows of a task."""
    rows = load_rows(get_task(task).rows(count, seed=seed, split=split))
    return tokenize_rows(rows, load_tokenizer(resolve_base(BASE).folder), max_length=512).table


def ours(preset: str, task: str, seed: int, folder: str) -> Any:
    """Train with `AdapterTrainer`; returns the model."""
    settings = arguments(preset, seed, folder)
    args = AdapterTrainingArguments(**settings, memory_preset=preset, rank=8, show_progress=False, preflight=False)
    trainer = AdapterTrainer(BASE, args, table(task, seed, "train", STEPS * ROWS))
    trainer.train()
    return trainer.model


def hf(preset: str, task: str, seed: int, folder: str) -> Any:
    """Train with HF Trainer, and PEFT for a LoRA; returns the model."""
    from peft import LoraConfig, get_peft_model

    chosen, base = MEMORY_PRESETS[preset], resolve_base(BASE)
    whole = chosen.trains != "lora"
    dtype = torch.float32 if whole else chosen.torch_dtype
    model = load_base_model(base.folder, dtype=dtype, quantization_config=chosen.quantization_config())
    prepare_for_training(model, replace(chosen, gradient_checkpointing=False))
    if chosen.trains == "head":
        model.get_output_embeddings().requires_grad_(True)
    if not whole:
        set_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    optimizer = chosen.optimizer.removeprefix("paged_")
    settings = arguments(preset, seed, folder)
    tokenizer = load_tokenizer(base.folder)
    Trainer(
        model,
        TrainingArguments(**settings, bf16=whole, optim=optimizer),
        train_dataset=table(task, seed, "train", STEPS * ROWS).select_columns(["input_ids", "labels"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()
    return model


@torch.no_grad()
def held_out_loss(model: Any, rows: Any, dtype: torch.dtype | None) -> float:
    """Mean cross entropy over the answers' tokens, in nats, the same plain way for both; the weights are cast to `dtype`."""
    model = (model if dtype is None else model.to(dtype)).eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        part = [rows[index] for index in range(start, min(start + 8, len(rows)))]
        longest = max(len(row["input_ids"]) for row in part)
        ids, goals = (
            torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in part], device=model.device)
            for name, fill in (("input_ids", 0), ("labels", -100))
        )
        # What fills a row comes after all that is learned, so that nothing attends to it.
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(
            F.cross_entropy(logits.flatten(0, 1), goals[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        )
        count += int((goals[:, 1:] != -100).sum())
    return total / count


def run(trainer: str, preset: str, task: str, seed: int) -> dict[str, Any]:
    """One run: the held-out loss that it ends with."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = (ours if trainer == "ours" else hf)(preset, task, seed, str(Path(folder) / "run"))
    chosen = MEMORY_PRESETS[preset]
    dtype = None if chosen.quantization else torch.float32 if chosen.dtype == "float32" else torch.bfloat16
    loss = held_out_loss(model, table(task, seed, "held-out", HELD_OUT), dtype)
    return {"held_out_loss": loss, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Make the runs that are missing, and write each at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    path = RESULTS / f"{NAME}.json"
    runs: dict[str, Any] = json.loads(path.read_bytes())["runs"] if path.exists() else {}
    wanted = [
        (trainer, preset, task, seed)
        for seed in range(3)
        for task in TASKS
        for preset, reference in PRESETS.items()
        for trainer in ("hf", "ours")
        if trainer == "ours" or preset == reference
    ]
    for job in wanted:
        name = ":".join(map(str, job))
        if name in runs or time.monotonic() >= end:
            continue
        runs[name] = run(*job)
        print(name, runs[name], flush=True)
        write(runs, len(wanted))


def write(runs: dict[str, Any], wanted: int) -> None:
    """Write all runs, and for each preset how far its losses are from HF's."""
    presets: dict[str, Any] = {}
    for preset, reference in PRESETS.items():
        ratios = [
            (
                runs[f"ours:{preset}:{task}:{seed}"]["held_out_loss"],
                runs[f"hf:{reference}:{task}:{seed}"]["held_out_loss"],
            )
            for task in TASKS
            for seed in range(3)
            if {f"ours:{preset}:{task}:{seed}", f"hf:{reference}:{task}:{seed}"} <= runs.keys()
        ]
        if ratios:
            off = [our / their - 1 for our, their in ratios]
            presets[preset] = {"runs": len(off), "mean": sum(off) / len(off), "worst": max(off, key=abs)}
            presets[preset]["lowest_loss"] = min(our for our, _ in ratios)
    everything = {"worst": max((abs(one["worst"]) for one in presets.values()), default=None)}
    everything["worst_mean"] = max((abs(one["mean"]) for one in presets.values()), default=None)
    summary = {"made": len(runs), "wanted": wanted, **everything, "presets": presets}
    settings = {"base": BASE, "steps": STEPS, "rows_a_step": ROWS, "held_out_rows": HELD_OUT, "rates": RATES}
    write_result(NAME, {**settings, "summary": summary, "runs": runs})


if __name__ == "__main__":
    main()
