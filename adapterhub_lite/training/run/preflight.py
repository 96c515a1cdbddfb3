"""The pre-flight: the longest batch of the run first, so that running out of memory takes seconds, not hours."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterhub_lite.errors import OutOfMemoryError
from adapterhub_lite.training.run.replanning import is_out_of_memory

Step = Callable[[list[dict[str, Any]]], None]


def longest_rows(table: Any, count: int) -> list[dict[str, Any]]:
    """Return the `count` longest rows of a tokenised table, longest first."""
    lengths = table["length"] if "length" in table.column_names else [len(ids) for ids in table["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:count]
    return [table[index] for index in order]


def fly(step: Step, rows: Sequence[dict[str, Any]], accumulation: int, describe_device: str) -> None:
    """Run `step` on the longest rows; when memory runs out, find by halving what would fit, and say so.

    `step` makes one whole step (forward, backward, optimizer) and undoes it.

    Raises:
        OutOfMemoryError: the batch does not fit; the text says which would.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    count = len(rows)
    while count:
        try:
            step(list(rows[:count]))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        count //= 2
    if count == len(rows):
        return
    wanted = (
        f"The longest batch of this run ({len(rows)} rows of up to {longest} tokens) does not fit on {describe_device}."
    )
    if count:
        times = -(-len(rows) * accumulation // count)
        raise OutOfMemoryError(
            f"{wanted} {count} rows would: set per_device_train_batch_size={count} and "
            f"gradient_accumulation_steps={times} for the same result."
        )
    raise OutOfMemoryError(
        f"{wanted} Not even one row does: set gradient_checkpointing=True, lower max_length, or take a smaller or "
        "quantised base."
    )


@contextmanager
def nothing_happened(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put trainable tensors, gradients, optimizer state and random numbers back as they were, whatever happens."""
    before = [parameter.detach().clone() for parameter in parameters]
    randomness = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        optimizer.state.clear()
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])
        torch.set_rng_state(randomness[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
