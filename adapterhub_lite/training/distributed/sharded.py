"""Models whose tensors an engine splits over processes: which engine it is, and how their tensors become whole.

Knows the arguments of a run, DeepSpeed's public functions and DTensors; no trainer.
"""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from adapterhub_lite.errors import ConfigurationError


def join_processes(args: TrainingArguments) -> None:
    """Meet the other processes before a base is opened: ZeRO-3 splits it while it is read.

    Raises:
        ConfigurationError: FSDP is asked for where Accelerate would leave the model whole without a word, or one
            process sees several GPUs.
    """
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"{args.n_gpu} GPUs are visible and one process was started. Start one process per GPU with "
            "`accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    engine = engine_of(args)
    if engine == "fsdp" and args.device.type == "cpu":
        raise ConfigurationError(
            "Accelerate does not split a model with FSDP on a CPU: every process would hold all of it. Use DDP or ZeRO "
            "there, or run on GPUs."
        )
    if engine is not None and engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if args.device.type == "cpu" else None, auto_mpi_discovery=False)


def least(number: int) -> int:
    """The least of what the processes of a run say; every process must call it. `number` itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    found = [number] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, number)
    return min(found)


def part_at_exit() -> None:
    """Let the threads of gloo come to rest before the interpreter is taken down.

    They take Python's lock to let go of tensors. One that asks for it too late is ended by force inside C++, and so is
    a process whose work was done (https://github.com/pytorch/pytorch/pull/179291). Leaving the group is not enough:
    DDP and DeepSpeed keep it, and its threads with it. From Python 3.14 on a late thread waits for ever instead.
    """
    # Registered by each trainer, it is still called once.
    atexit.unregister(_rest)
    atexit.register(_rest)


def _rest(patience_seconds: float = 2.0) -> None:
    end = time.monotonic() + patience_seconds
    at_rest = 0
    # Asleep once, a thread may wait for the lock that was given up here; then it is awake the next time.
    while at_rest < 2 and time.monotonic() < end:
        time.sleep(0.001)
        at_rest = at_rest + 1 if _gloo_sleeps() else 0


def _gloo_sleeps() -> bool:
    """Whether no thread of gloo's runs, or is about to."""
    for status in Path("/proc/self/task").glob("*/status"):
        # A thread may end between being listed and being read.
        with suppress(OSError):
            text = status.read_text()
            if "gloo_runloop" in text and "State:\tS" not in text:
                return False
    return True


def engine_of(args: TrainingArguments) -> str | None:
    """The engine that was chosen by hand or by `accelerate launch`, as a strategy's name: zero1 to zero3, fsdp."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    asked_for = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "fsdp" if asked_for else None


@contextmanager
def built_whole(args: TrainingArguments) -> Iterator[None]:
    """While inside, models are built whole, although those that are read later will be split by ZeRO-3."""
    # Given by hand, or by `accelerate launch`.
    plugin = getattr(args, "deepspeed_plugin", None)
    split_later = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if split_later is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(split_later)


def splits_weights(args: TrainingArguments) -> bool:
    """Whether the run's engine splits the weights themselves, and not only what the optimizer keeps."""
    return engine_of(args) in ("zero3", "fsdp")


def splits_states(trainer: Trainer) -> bool:
    """Whether the run's engine splits what the optimizer keeps, or more."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


@contextmanager
def gathered(parameters: list[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """While inside, parameters that ZeRO-3 has split are whole; `changed` keeps what is written. All must enter."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters, modifier_rank=0 if changed else None):
            yield
    else:
        yield


def whole(tensor: Any) -> Tensor:
    """`tensor` itself, or all of a DTensor; then every process must call it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found
