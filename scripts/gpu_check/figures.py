"""Time and peak of the loss at a large vocabulary, and the memory table: predicted and measured."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.memory import MEMORY_PRESETS, Machine, refusal
from scripts.bench.train.loss import Problem, contestants, make_inputs, one_step
from scripts.gpu_check.sizes import Sizes, chats, make_base
from scripts.gpu_check.training import arguments

# (preset, whether at every rank)
TABLE = (("lora-bf16-gc", True), ("lora-bf16", False), ("qlora-nf4-gc", False), ("full", False))


def loss_figures(sizes: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of a forward and a backward pass, and the growth of allocated bytes, with the head frozen and trained."""
    tokens, vocabulary, columns = sizes.loss
    for trained in (False, True):
        problem = Problem("trained" if trained else "frozen", tokens, vocabulary, columns, head_trained=trained)
        found, missing = contestants(sizes.device)
        for name, why_not in missing.items():
            yield f"{problem.name}, {name}", {"not run": why_not}
        inputs = make_inputs(problem, sizes.device)
        for name, loss in found.items():
            try:
                one_step(loss, inputs)  # compiled, tuned
                before, peak = _allocated(sizes.device), None
                seconds, value = zip(*(one_step(loss, inputs) for _ in range(sizes.rounds)), strict=True)
                if sizes.device.type == "cuda":
                    inputs[0].grad = inputs[1].grad = None
                    torch.cuda.reset_peak_memory_stats()
                    before = _allocated(sizes.device)
                    one_step(loss, inputs)
                    peak = torch.cuda.max_memory_allocated() - before
                yield f"{problem.name}, {name}", {"seconds": median(seconds), "peak_bytes": peak, "loss": value[0]}
            except (RuntimeError, ValueError, NotImplementedError) as error:  # a peer that cannot do it, or memory
                yield f"{problem.name}, {name}", {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()
            if sizes.device.type == "cuda":
                torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def memory_figures(sizes: Sizes, scratch: Path, size: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Peak of two steps of one row under each preset, predicted before and measured after."""
    from adapterhub_lite.training import AdapterTrainer

    base = make_base(size, scratch, torch.bfloat16, sizes.device)
    cells = [
        (name, rank) for name, each in TABLE for rank in (sizes.ranks if each else sizes.ranks[1:2] or sizes.ranks)
    ]
    for preset, rank in cells:
        case = f"{size}, {preset}, rank {rank}"
        why_not = refusal(MEMORY_PRESETS[preset], Machine.present(device=sizes.device.type))
        if why_not is not None:
            yield case, {"not run": why_not}
            continue
        began = time.perf_counter()
        args = arguments(
            scratch / "run", sizes, memory_preset=preset, rank=rank, max_steps=2, per_device_train_batch_size=1
        )
        try:
            trainer = AdapterTrainer(str(base), args, chats(2, sizes.tokens))
            trainer.train()
        except (AdapterHubError, RuntimeError) as error:
            yield case, {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            predicted = trainer.memory_choice.uncorrected
            yield (
                case,
                {
                    "predicted_bytes": predicted.total if predicted else None,
                    "measured_bytes": trainer.meter.memory.peak_bytes(),
                    "components": predicted.components if predicted else None,
                    "seconds": time.perf_counter() - began,
                },
            )
        trainer = None
        gc.collect()
        if sizes.device.type == "cuda":
            torch.cuda.empty_cache()
