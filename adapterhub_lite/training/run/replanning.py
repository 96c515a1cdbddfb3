"""What to try when memory runs out in a run: fewer rows at a time first, then activations made again."""

from dataclasses import replace
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from adapterhub_lite.errors import OutOfMemoryError
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.run.memory_choice import MemoryChoice

PHRASES = ("can't allocate memory", "out of memory", "Cannot allocate memory", "No executable batch size found")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, had no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES))


def with_less(args: AdapterTrainingArguments, choice: MemoryChoice, error: BaseException) -> MemoryChoice:
    """Change `args` to what needs less memory for the same updates, and say so in the choice.

    Raises:
        OutOfMemoryError: the run is to stop (several processes cannot change together), or nothing is left to try.
    """
    if args.on_out_of_memory == "stop" or args.world_size > 1:
        if isinstance(error, OutOfMemoryError):
            raise error
        raise OutOfMemoryError(what_would_fit(args, choice)) from error
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows > 1:
        fewer = max(part for part in range(1, rows // 2 + 1) if rows % part == 0)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = fewer, times * (rows // fewer)
        reason = f"memory ran out with {rows} rows at a time: {fewer} rows, {rows // fewer} times as often"
    elif not args.activation_checkpointing:
        args.activation_checkpointing = args.gradient_checkpointing = True
        args.activation_checkpointing_kwargs = {"use_reentrant": choice.preset.use_reentrant}
        reason = "memory ran out with one row at a time: activations are made again"
        choice = replace(choice, preset=replace(choice.preset, gradient_checkpointing=True))
    else:
        raise OutOfMemoryError(what_would_fit(args, choice)) from error
    # What was predicted was for more.
    return replace(choice, predicted=None, uncorrected=None, reasons=(*choice.reasons, reason))


def what_would_fit(args: AdapterTrainingArguments, choice: MemoryChoice) -> str:
    """The sentence for a run that memory ran out in, when nothing is tried any more."""
    # The search for a batch size ends with a single row.
    rows = 1 if args.auto_find_batch_size else args.per_device_train_batch_size
    times = args.gradient_accumulation_steps
    said = f"Memory ran out on {args.device} with {rows} rows of up to {args.max_length} tokens at a time."
    if rows > 1:
        fewer = max(part for part in range(1, rows // 2 + 1) if rows % part == 0)
        return (
            f"{said} The same updates need about {fewer / rows:.0%} of the activations with "
            f"per_device_train_batch_size={fewer} and gradient_accumulation_steps={times * (rows // fewer)}; "
            "on_out_of_memory='replan' tries that by itself."
        )
    if not args.activation_checkpointing:
        return f"{said} Set activation_checkpointing=True, or on_out_of_memory='replan'."
    packed = "a smaller base" if choice.preset.quantization else "memory_preset='qlora-nf4-gc'"
    return f"{said} Activations are made again already: take {packed}, or shorter rows."


def checkpoint_to_go_on_from(trainer: Any) -> str | None:
    """The last checkpoint of a run that memory ran out in; where there is none, what is whole is saved as one now."""
    trainer.model.zero_grad(set_to_none=True)
    if trainer.state.global_step == 0:
        trainer.optimizer = trainer.lr_scheduler = None
        return None
    folder = str(trainer.args.output_dir)
    if get_last_checkpoint(folder) is None:
        # The step that failed changed no weight: forward and backward come before the optimizer.
        trainer._save_checkpoint(trainer.model, None)
    return get_last_checkpoint(folder)
