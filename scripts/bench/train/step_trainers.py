"""The trainers that `train_step.py` compares, each set up as its own documentation says, on the same tokens."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import tokenize_rows
from adapterhub_lite.training.run.measurement import PeakMemory
from scripts.bench.train.train_step import BASE, chats


class Clock(TrainerCallback):
    """Takes the seconds of each optimizer step."""

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = self.now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(self.now() - self.began)


class ProcessorClock(Clock):
    """Takes those that the process was given a processor for."""

    now = staticmethod(time.process_time)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train `job["steps"]` steps; returns seconds (the first step left out), peak bytes, tokens, losses."""
    import torch

    base = resolve_base(BASE)
    tokenizer = load_tokenizer(base.folder)
    count = job["rows"] * (job["steps"] + 1)
    if job["lengths"] == "filled":
        texts = [" ".join(f"word{(index + i) % 97}" for i in range(job["length"])) for index in range(count)]
        rows = [
            {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": t}]} for t in texts
        ]
    else:
        rows = chats(count, job["seed"], job["lengths"])
    limit = job.get("length", 512)
    table = tokenize_rows(load_rows(rows), tokenizer, max_length=limit, overlong="truncate").table
    if job["lengths"] == "filled":
        table = with_end(table, tokenizer.eos_token_id)
    settings: dict[str, Any] = {
        "output_dir": str(Path(job["folder"]) / "run"),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["rows"],
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
        "data_seed": job["seed"],
        "activation_checkpointing": job.get("checkpointing", False),
        "dataloader_pin_memory": False,
    }
    clock = Clock()
    memory = PeakMemory(torch.device("cpu"))
    trainer = BUILDERS[job["trainer"]](base, tokenizer, table, settings)
    trainer.add_callback(clock)
    held_out = chats(job["evaluate"], 10_000 + job["seed"], "mixed") if "evaluate" in job else []
    evaluation = held_out and tokenize_rows(load_rows(held_out), tokenizer, max_length=512).table
    before = held_out_loss(trainer.model, evaluation) if held_out else None
    trainer.train()
    lengths = table["length"][: job["rows"] * job["steps"]]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = {
        "seconds": clock.seconds[1:],
        "peak_bytes": memory.peak_bytes(),
        "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths)},
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    if held_out:
        result |= {"eval_loss_before": before, "eval_loss": held_out_loss(trainer.model, evaluation)}
    return result


def held_out_loss(model: Any, table: Any) -> float:
    """Mean cross entropy over the answers' tokens, in nats: the same plain way for all trainers, one row at a time, in fp32."""
    import torch
    from torch.nn import functional as F

    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in table:
            goals = torch.tensor(row["labels"][1:])
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, goals, ignore_index=-100, reduction="sum"))
            count += int((goals != -100).sum())
    model.train(was_training)
    return total / count


def with_end(table: Any, end: int | None) -> Any:
    """Rows that were cut to their length, with the end token as the last to be learned."""
    from datasets import Dataset

    columns = {name: [[*row[:-1], end] for row in table[name]] for name in ("input_ids", "labels")}
    return Dataset.from_dict({**columns, "length": table["length"]})


def ours(base: Any, tokenizer: Any, table: Any, settings: dict[str, Any]) -> Any:
    """AdapterTrainer with its defaults; proof and pre-flight are of the first step and not timed."""
    args = AdapterTrainingArguments(**settings, rank=8, alpha=16, show_progress=False, preflight=False)
    return AdapterTrainer(load_base_model(base.folder), args, table, processing_class=tokenizer, base=base)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def hf(base: Any, tokenizer: Any, table: Any, settings: dict[str, Any]) -> Any:
    """HF Trainer with PEFT: batches padded to the longest row, full logits, the adapter in fp32."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = load_base_model(base.folder)
    # Right before the adapter is drawn, as in the other two: all three begin with the same A.
    set_seed(settings["seed"])
    return Trainer(
        get_peft_model(model, _lora()),
        TrainingArguments(**settings),
        train_dataset=table.select_columns(["input_ids", "labels"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def trl(base: Any, tokenizer: Any, table: Any, settings: dict[str, Any]) -> Any:
    """TRL's SFTTrainer on the same tokens and labels, its defaults for the loss, no activation checkpointing or autocast."""
    from trl import SFTConfig, SFTTrainer

    data = table.select_columns(["input_ids", "labels"])
    config = SFTConfig(**settings, bf16=False, max_length=None, packing=False)
    return SFTTrainer(
        load_base_model(base.folder), config, train_dataset=data, processing_class=tokenizer, peft_config=_lora()
    )


BUILDERS = {"ours": ours, "hf": hf, "trl": trl}
