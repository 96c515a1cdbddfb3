"""Adapters whose tensors are split over processes: gathered to be saved, and resumed by any number of processes.

A LoRA is small, so its optimizer state is kept whole, one tensor a parameter, and not as each process's part of it: a
checkpoint does not know how many processes wrote it. Knows DeepSpeed's public functions and DTensors, no trainer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME

from adapterhub_lite.errors import ConfigurationError, IntegrityError
from adapterhub_lite.training.adapters import kept_tensors

STATE_FILE = "sharded_state.safetensors"
MASTER, MOMENTS, STEPS = "master", ("exp_avg", "exp_avg_sq"), "step"


def join_processes(args: Any) -> None:
    """Meet the other processes before a base is opened: ZeRO-3 splits it while it is read.

    Raises:
        ConfigurationError: FSDP is asked for where Accelerate would leave the model whole without a word.
    """
    engine = engine_of(args)
    if engine == "fsdp" and args.device.type == "cpu":
        raise ConfigurationError(
            "Accelerate does not split a model with FSDP on a CPU: every process would hold all of it. Use DDP or ZeRO "
            "there, or run on GPUs."
        )
    if engine is not None and engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if args.device.type == "cpu" else None, auto_mpi_discovery=False)


def engine_of(args: Any) -> str | None:
    """The engine that was chosen by hand or by `accelerate launch`, as a strategy's name: zero1 to zero3, fsdp."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    asked_for = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "fsdp" if asked_for else None


@contextmanager
def built_whole(args: Any) -> Iterator[None]:
    """While inside, models are built whole, although those that are read later will be split by ZeRO-3."""
    split_later = getattr(args, "hf_deepspeed_config", None)
    if split_later is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(split_later)


def splits_weights(args: Any) -> bool:
    """Whether the run's engine splits the weights themselves, and not only what the optimizer keeps."""
    return engine_of(args) in ("zero3", "fsdp")


@contextmanager
def gathered(parameters: list[nn.Parameter], *, changed: bool = False) -> Iterator[None]:
    """While inside, parameters that ZeRO-3 has split are whole; `changed` keeps what is written. All must enter."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters, modifier_rank=0 if changed else None):
            yield
    else:
        yield


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds, whole, whatever split it. Every process must call it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    split = any(hasattr(x, "ds_id") or hasattr(x, "full_tensor") for x in trained)
    with gathered(trained):
        kept = kept_tensors(model)
        return {name: _whole(tensor).detach().cpu().clone() for name, tensor in kept.items()} if split else kept


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def save_state(trainer: Any, folder: Path) -> None:
    """Write master weights, optimizer state and schedule of a run under DeepSpeed into `folder`.

    Every process must call it, the first one writes: `<parameter>:master`, `:exp_avg`, `:exp_avg_sq` and `step`.
    """
    model, engine, write = trainer.model, trainer.model_wrapped, trainer.args.should_save
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    for name, parameter in _trained(model):
        found[f"{name}:{MASTER}"] = safe_get_full_fp32_param(parameter)
        for moment in MOMENTS:
            found[f"{name}:{moment}"] = safe_get_full_optimizer_state(parameter, moment)
    states = _states(engine)
    found[STEPS] = torch.as_tensor(float(states[0][STEPS]) if states else 0.0)
    missing = sorted(name for name, value in found.items() if value is None)
    if missing:
        raise ConfigurationError(
            f"The optimizer under DeepSpeed keeps no {missing[0].rsplit(':', 1)[-1]}: only AdamW's kind can be resumed."
        )
    if write:
        save_file({name: value.detach().cpu().clone() for name, value in found.items()}, folder / STATE_FILE)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_state(trainer: Any, folder: Path) -> None:
    """Put what `save_state` wrote into a run under DeepSpeed, however many processes it has now.

    Raises:
        IntegrityError: the checkpoint lacks a parameter that is trained now.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    model, engine, path = trainer.model, trainer.model_wrapped, folder / STATE_FILE
    if not path.is_file():
        raise IntegrityError(
            f"{folder} has no {STATE_FILE}: it was not saved under DeepSpeed. Resume it with the strategy it began with."
        )
    saved = load_file(path)
    trained = dict(_trained(model))
    lacking = sorted(name for name in trained if f"{name}:{MASTER}" not in saved)
    if lacking:
        raise IntegrityError(f"{path} lacks {len(lacking)} of {len(trained)} trained tensors ({lacking[0]}, ...).")
    _make_states(engine.optimizer)
    for name, parameter in trained.items():
        master = saved[f"{name}:{MASTER}"]
        safe_set_full_fp32_param(parameter, master)
        with gathered([parameter], changed=True), torch.no_grad():
            parameter.copy_(master)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, saved[f"{name}:{moment}"], moment)
    for state in _states(engine):
        state[STEPS] = torch.as_tensor(float(saved[STEPS]))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _make_states(optimizer: Any) -> None:
    """Give a DeepSpeed optimizer that has not stepped yet the states that its first step would make."""
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        state = optimizer.optimizer.state[flat]
        state.setdefault(STEPS, torch.tensor(0.0))
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat))
    if not stage3:
        # ZeRO-1 and 2 find a parameter's part of the states by a link that is made at the first step.
        optimizer._lazy_init_hp_params_optimizer_state()


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _states(engine: Any) -> list[dict[str, Any]]:
    """The states of the torch optimizer inside DeepSpeed's; it steps whole partitions, all at the same step."""
    return [state for state in engine.optimizer.optimizer.state.values() if STEPS in state]
