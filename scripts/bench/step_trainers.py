"""The trainers that `train_step.py` compares, each set up as its own documentation says, on the same tokens."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from adapterhub_lite.training.measurement import PeakMemory
from adapterhub_lite.training.rows import load_rows
from adapterhub_lite.training.tokenization import tokenize_rows
from scripts.bench.train_step import BASE, chats


class Clock(TrainerCallback):
    """Takes the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.began)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train `job["steps"]` steps; returns seconds (the first step left out), peak bytes, tokens, losses."""
    import torch

    base = resolve_base(BASE)
    tokenizer = load_tokenizer(base.folder)
    count = job["rows"] * (job["steps"] + 1)
    if job["lengths"] == "filled":
        rows = [{"messages": _filled(job["length"], index)} for index in range(count)]
    else:
        rows = chats(count, job["seed"], job["lengths"])
    limit = job.get("length", 512)
    table = tokenize_rows(load_rows(rows), tokenizer, max_length=limit, overlong="truncate").table
    if job["lengths"] == "filled":
        table = _ended(table, tokenizer.eos_token_id)
    held_out = chats(job["evaluate"], 10_000 + job["seed"], "mixed") if "evaluate" in job else None
    evaluation = held_out and tokenize_rows(load_rows(held_out), tokenizer, max_length=512).table
    settings: dict[str, Any] = {
        "output_dir": str(Path(job["folder"]) / "run"),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["rows"],
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
        "activation_checkpointing": job.get("checkpointing", False),
        "dataloader_pin_memory": False,
    }
    clock = Clock()
    memory = PeakMemory(torch.device("cpu"))
    trainer = BUILDERS[job["trainer"]](base, tokenizer, table, evaluation, settings)
    trainer.add_callback(clock)
    trainer.train()
    lengths = table["length"][: job["rows"] * job["steps"]]
    result = {
        "seconds": clock.seconds[1:],
        "peak_bytes": memory.peak_bytes(),
        "tokens": {"mean": sum(lengths) / len(lengths), "longest": max(lengths)},
        "last_loss": [line["loss"] for line in trainer.state.log_history if "loss" in line][-1],
    }
    if evaluation is not None:
        result["eval_loss"] = trainer.evaluate()["eval_loss"]
    return result


def _ended(table: Any, end: int | None) -> Any:
    """Rows that were cut to their length, with the end token as the last to be learned."""
    from datasets import Dataset

    columns = {name: [[*row[:-1], end] for row in table[name]] for name in ("input_ids", "labels")}
    return Dataset.from_dict({**columns, "length": table["length"]})


def _filled(length: int, index: int) -> list[dict[str, str]]:
    text = " ".join(f"word{(index + i) % 97}" for i in range(length))
    return [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]


def ours(base: Any, tokenizer: Any, table: Any, evaluation: Any, settings: dict[str, Any]) -> Any:
    """AdapterTrainer with its defaults; proof and pre-flight are of the first step and not timed."""
    args = AdapterTrainingArguments(**settings, rank=8, alpha=16, show_progress=False, preflight=False)
    return AdapterTrainer(load_base_model(base.folder), args, table, evaluation, tokenizer, base=base)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def hf(base: Any, tokenizer: Any, table: Any, evaluation: Any, settings: dict[str, Any]) -> Any:
    """HF Trainer with PEFT: batches padded to the longest row, full logits, the adapter in fp32."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    set_seed(settings["seed"])
    model = get_peft_model(load_base_model(base.folder), _lora())
    keep = ["input_ids", "labels"]
    return Trainer(
        model,
        TrainingArguments(**settings),
        train_dataset=table.select_columns(keep),
        eval_dataset=None if evaluation is None else evaluation.select_columns(keep),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def trl(base: Any, tokenizer: Any, table: Any, evaluation: Any, settings: dict[str, Any]) -> Any:
    """TRL's SFTTrainer on the same tokens, its defaults for the loss, no gradient checkpointing, no autocast."""
    from trl import SFTConfig, SFTTrainer

    def masked(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion_mask": [int(label != -100) for label in row["labels"]]}

    data = table.map(masked, keep_in_memory=True, remove_columns=["labels", "length"])
    config = SFTConfig(**settings, bf16=False, max_length=None, packing=False)
    return SFTTrainer(
        load_base_model(base.folder), config, train_dataset=data, processing_class=tokenizer, peft_config=_lora()
    )


BUILDERS = {"ours": ours, "hf": hf, "trl": trl}
