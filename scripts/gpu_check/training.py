"""Training on the device at hand: a step against HF's own with PEFT, on a plain and a 4-bit base, and going on from a checkpoint."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
from scripts.gpu_check.sizes import Sizes, chats, make_base, randomise, synchronise

# Relative difference allowed between two ways to compute the same: loss, and gradient of each LoRA tensor.
NEAR = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 0.1)}


def arguments(folder: Path, sizes: Sizes, **settings: Any) -> AdapterTrainingArguments:
    """The arguments of a short run."""
    given: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": sizes.rows, "rank": 8, "learning_rate": 1e-3, "max_length": sizes.tokens,
        "show_progress": False, "save_strategy": "no", "report_to": "none", "use_cpu": sizes.device.type == "cpu",
        "seed": 7, "overlong": "truncate",
    }  # fmt: skip
    return AdapterTrainingArguments(output_dir=str(folder), **(given | settings))


def lora(rank: int = 8) -> LoraConfig:
    """The adapter of the peers: all linear layers."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def step_laws(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A step's loss and gradients by our trainer, beside those of the model's own loss on the same padded batch."""
    torch.manual_seed(0)
    base = make_base(sizes.proven, scratch, torch.float32, sizes.device)
    for dtype, preset in ((torch.float32, "lora-fp32"), (torch.bfloat16, "lora-bf16")):
        for packs in (True, False):
            made: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), lora())
            randomise(made)
            given = {"memory_preset": preset, "padding_free": packs}
            yield f"{preset}, {'packed' if packs else 'padded'}", _step_law(made, sizes, scratch, dtype, given)
            made = None
            _free()


def qlora_laws(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A step on 4-bit and 8-bit bases against the model's own loss, and a short run of each preset that is to be seen."""
    base = make_base(sizes.proven, scratch, torch.bfloat16, sizes.device)
    for preset in ("qlora-nf4", "qlora-nf4-gc", "qlora-nf4-paged", "lora-int8"):
        trainer = AdapterTrainer(
            str(base), arguments(scratch / "run", sizes, memory_preset=preset), chats(16, sizes.tokens)
        )
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found = _compared(trainer, torch.bfloat16)
        found |= {
            "losses": losses,
            "peak_bytes": trainer.meter.memory.peak_bytes(),
            "predicted_bytes": trainer.memory_choice.predicted.total if trainer.memory_choice.predicted else None,
        }
        yield preset, found
        trainer = None
        _free()


def resume_laws(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A run that goes on from its checkpoint ends where the whole run ended."""
    base = make_base(sizes.proven, scratch, torch.float32, sizes.device)
    settings = {"memory_preset": "lora-fp32", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    rows = chats(16, sizes.tokens)
    ends = []
    for name, checkpoint in (("whole", None), ("resumed", str(scratch / "whole" / "checkpoint-3"))):
        trainer = AdapterTrainer(str(base), arguments(scratch / name, sizes, **settings), rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        ends.append((losses, {n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad}))
        trainer = None
        _free()
    (whole, weights), (resumed, again) = ends
    apart = max(float((weights[name] - again[name]).abs().max()) for name in weights)
    yield (
        "resume",
        {
            "ok": apart <= 1e-6 and set(weights) == set(again),
            "bitwise": apart == 0.0,
            "apart": apart,
            "losses": [whole, resumed],
        },
    )


def _step_law(model: Any, sizes: Sizes, scratch: Path, dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    trainer = AdapterTrainer(model, arguments(scratch / "run", sizes, max_steps=1, **given), chats(16, sizes.tokens),
                             processing_class=_tokenizer(scratch, sizes))  # fmt: skip
    trainer.train()
    return _compared(trainer, dtype)


def _tokenizer(scratch: Path, sizes: Sizes) -> Any:
    from adapterhub_lite.bases import load_tokenizer

    return load_tokenizer(make_base(sizes.proven, scratch, torch.float32, sizes.device))


def _compared(trainer: AdapterTrainer, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradients of the first rows, by the trainer's collator and loss and by the model's own."""
    model, device = trainer.model, trainer.args.device
    rows = [trainer.train_dataset[i] for i in range(trainer.args.train_batch_size)]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    model.train()
    found = []
    for collator, own in ((trainer.data_collator, False), (trainer.padded, True)):
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in collator(rows).items()}
        model.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss if own else trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {n: p.grad.detach().double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((float(loss.detach()), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    model.zero_grad()
    apart = {n: float((g - their_gradients[n]).norm() / their_gradients[n].norm().clamp(min=1e-12))
             for n, g in our_gradients.items() if n in their_gradients}  # fmt: skip
    worst = max(apart, key=lambda name: apart[name])
    near_loss, near_gradient = NEAR[dtype]
    same_names = set(our_gradients) == set(their_gradients)
    return {
        "ok": same_names and abs(ours - theirs) <= near_loss * abs(theirs) and apart[worst] <= near_gradient,
        "loss": [ours, theirs],
        "gradient_apart": apart[worst],
        "worst": worst,
        "loss_by": trainer.assembly.loss.record(),
    }


@dataclass
class Clock(TrainerCallback):
    """Takes the seconds of each optimizer step, the device's work included."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        synchronise(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        synchronise(self.device)
        self.seconds.append(time.perf_counter() - self.began)


def step_figures(sizes: Sizes, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of a step and its peak: ours and HF's Trainer with PEFT, bf16, the same rows in the same order."""
    for size in sizes.measured[:1]:
        base = make_base(size, scratch, torch.bfloat16, sizes.device)
        for checkpointing in (False, True):
            for who in ("ours", "hf"):
                yield f"{size}, {who}, checkpointing {checkpointing}", _timed(who, base, sizes, scratch, checkpointing)
                _free()


def _timed(who: str, base: Path, sizes: Sizes, scratch: Path, checkpointing: bool) -> dict[str, Any]:
    steps, clock = 8, Clock(sizes.device)
    rows, preset = chats(steps * sizes.rows, sizes.tokens), "lora-bf16-gc" if checkpointing else "lora-bf16"
    args = arguments(scratch / "run", sizes, memory_preset=preset, max_steps=steps, preflight=False, proof=False)
    trainer: Any = AdapterTrainer(str(base), args, rows)
    if who == "hf":
        table = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
        tokenizer = trainer.processing_class
        del trainer
        _free()
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), lora())
        plain = TrainingArguments(
            output_dir=str(scratch / "hf"), max_steps=steps, per_device_train_batch_size=sizes.rows, learning_rate=1e-3,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=7, bf16=True, logging_steps=1,
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=sizes.device.type == "cpu",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, plain, train_dataset=table, data_collator=collator, processing_class=tokenizer)
    trainer.add_callback(clock)
    if sizes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if sizes.device.type == "cuda" else None
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": clock.seconds, "peak_bytes": peak, "losses": losses}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
