"""What an optimizer remembers, whole and by the names of parameters: a checkpoint that any number of processes can resume.

Engines that split a run write each process's part of it, which as many processes can read again. A LoRA is small, so its
state is kept whole here, and a checkpoint knows neither how many processes wrote it nor which engine they ran under.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from adapterhub_lite.errors import ConfigurationError, IntegrityError
from adapterhub_lite.training.distributed.sharded import gathered, whole
from adapterhub_lite.training.model.adapters import whole_tensors
from adapterhub_lite.training.run import checkpoints

STATE_FILE = "whole_state.safetensors"
MASTER, MOMENTS, STEP = "master", ("exp_avg", "exp_avg_sq"), "step"
RATES = ("base_lrs", "_last_lr")
"""What a learning rate schedule keeps a group of parameters."""


def save_state(trainer: Trainer, folder: Path) -> None:
    """Write weights, optimizer state and schedule of a run into `folder`: `<parameter>:master`, `:exp_avg`, ... and `step`.

    Every process must call it; the first one writes.

    Raises:
        ConfigurationError: the optimizer is of a kind whose state DeepSpeed does not give whole.
    """
    states = _states_of(trainer)
    found = {
        f"{name}:{kind}": tensor
        for name, parameter in _trained(_model_of(trainer)).items()
        for kind, tensor in states.read(parameter).items()
    }
    if trainer.args.should_save:
        found[STEP] = torch.tensor(states.step)
        save_file({name: tensor.detach().cpu().clone() for name, tensor in found.items()}, folder / STATE_FILE)
        assert trainer.lr_scheduler is not None, "a run that has begun has a schedule"
        schedule: dict[str, Any] = trainer.lr_scheduler.state_dict()
        # With the rates of the filled groups alone.
        rates = {name: [schedule[name][i] for i in _filled(trainer)] for name in RATES if name in schedule}
        torch.save({**schedule, **rates}, folder / SCHEDULER_NAME)


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Load a whole checkpoint of `save_state`'s kind into a run whose engine is ready; verified before and after.

    Raises:
        IntegrityError: the checkpoint is not what was saved, or was not saved by `save_state`.
    """
    wanted = checkpoints.verify(folder)
    load_state(trainer, folder)
    tensors = whole_tensors(trainer.accelerator.unwrap_model(trainer.model))
    checkpoints.check_loaded(wanted or {}, tensors, folder)


def load_state(trainer: Trainer, folder: Path) -> None:
    """Put what `save_state` wrote into a run, however many processes it has now and whatever engine.

    Raises:
        IntegrityError: the checkpoint lacks a parameter that is trained now, or the file itself.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise IntegrityError(
            f"{folder} has no {STATE_FILE}: it was not saved under DeepSpeed or FSDP. Resume it without them."
        )
    saved = load_file(path)
    step = float(saved.pop(STEP))
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        name, _, kind = key.rpartition(":")
        kept.setdefault(name, {})[kind] = tensor
    trained = _trained(_model_of(trainer))
    lacking = sorted(trained.keys() - kept.keys())
    if lacking:
        raise IntegrityError(f"{path} lacks {len(lacking)} of {len(trained)} trained tensors ({lacking[0]}, ...).")
    states = _states_of(trainer)
    for name, parameter in trained.items():
        states.write(parameter, kept[name], step)
    _load_schedule(trainer, torch.load(folder / SCHEDULER_NAME, weights_only=True))


def _load_schedule(trainer: Trainer, kept: dict[str, Any]) -> None:
    assert trainer.lr_scheduler is not None and trainer.optimizer is not None, "a run that has begun has both"
    # Typed by torch as numbers, and holds lists of them.
    state: dict[str, Any] = trainer.lr_scheduler.state_dict()
    for name in RATES:
        if name in state:
            for group, rate in zip(_filled(trainer), kept[name], strict=True):
                state[name][group] = rate
    trainer.lr_scheduler.load_state_dict({**kept, **{name: state[name] for name in RATES if name in state}})
    # The schedule sets its rates when it steps, and that is after the first step of the resumed run.
    for settings, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        settings["lr"] = rate


def _filled(trainer: Trainer) -> list[int]:
    """Which groups of the optimizer hold parameters: DeepSpeed drops the others, and empties its own between steps."""
    assert trainer.optimizer is not None, "a run that has begun has an optimizer"
    groups = trainer.optimizer.param_groups
    return [index for index, group in enumerate(groups) if trainer.is_deepspeed_enabled or group["params"]]


class _States(Protocol):
    """The states of an optimizer; every process reads and writes each parameter in the same order."""

    @property
    def step(self) -> float: ...

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]: ...

    def write(self, parameter: nn.Parameter, kept: dict[str, Tensor], step: float) -> None: ...


def _states_of(trainer: Trainer) -> _States:
    return _ZeroStates(trainer.model_wrapped) if trainer.is_deepspeed_enabled else _TorchStates(trainer.optimizer)


class _TorchStates:
    """Of a torch optimizer, whose tensors are plain, or DTensors where FSDP2 has split them."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)

    @property
    def step(self) -> float:
        return next((float(state[STEP]) for state in self.optimizer.state.values() if STEP in state), 0.0)

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {MASTER: whole(parameter), **{kind: whole(tensor) for kind, tensor in state.items() if kind != STEP}}

    def write(self, parameter: nn.Parameter, kept: dict[str, Tensor], step: float) -> None:
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        state = {kind: _split_like(parameter, tensor) for kind, tensor in kept.items()}
        with torch.no_grad():
            parameter.copy_(state.pop(MASTER))
        self.optimizer.state[parameter] = {
            **state,
            STEP: torch.tensor(step, device=parameter.device if fused else "cpu"),
        }


class _ZeroStates:
    """Of an optimizer under DeepSpeed, which splits flat fp32 copies of the parameters."""

    def __init__(self, engine: Any) -> None:  # DeepSpeed has no types
        self.optimizer = engine.optimizer

    @property
    def step(self) -> float:
        return next((float(state[STEP]) for state in self.optimizer.optimizer.state.values() if STEP in state), 0.0)

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
        found[MASTER] = safe_get_full_fp32_param(parameter)
        missing = sorted(kind for kind, tensor in found.items() if tensor is None)
        if missing:
            raise ConfigurationError(
                f"The optimizer under DeepSpeed keeps no {missing[0]}: only AdamW's kind can be resumed."
            )
        return found

    def write(self, parameter: nn.Parameter, kept: dict[str, Tensor], step: float) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._begin()
        safe_set_full_fp32_param(parameter, kept[MASTER])
        with gathered([parameter], changed=True), torch.no_grad():
            parameter.copy_(kept[MASTER])
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, kept[moment], moment)
        # It steps whole partitions, all at the same step.
        for state in self.optimizer.optimizer.state.values():
            state[STEP] = torch.tensor(step)

    def _begin(self) -> None:
        """Make the states that the first step would make."""
        stage3 = hasattr(self.optimizer, "fp32_partitioned_groups_flat")
        flats = (
            self.optimizer.fp32_partitioned_groups_flat if stage3 else self.optimizer.single_partition_of_fp32_groups
        )
        for flat in flats:
            state = self.optimizer.optimizer.state[flat]
            state.setdefault(STEP, torch.tensor(0.0))
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(flat))
        if not stage3:
            # ZeRO-1 and 2 find a parameter's part of the states by a link that is made at the first step.
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _model_of(trainer: Trainer) -> nn.Module:
    assert trainer.model is not None, "a run has a model"
    return trainer.model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass some of its parameters are whole still; the optimizer knows the parts.
            module.reshard()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _split_like(parameter: Any, tensor: Tensor) -> Tensor:
    """`tensor` as `parameter` is held: whole on its device, or this process's part of a DTensor."""
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
