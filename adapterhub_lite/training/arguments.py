"""The arguments of a run: `TrainingArguments` with the settings of an adapter, and defaults that suit one machine."""

import functools
import logging
import os
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from adapterhub_lite import devices
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.porting import ANSWERS, packing_of, translated
from adapterhub_lite.training.settings import TARGET_GROUPS, TYPICAL_LENGTH, RunSettings, problems_of, token_texts

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def differing(args: Any) -> frozenset[str]:
    """The fields of a dataclass of arguments that differ from its defaults: what somebody set by hand."""
    return frozenset(
        one.name
        for one in fields(args)
        if one.init
        and getattr(args, one.name) != (one.default if one.default_factory is MISSING else one.default_factory())
    )


def _with_default(name: str, value: object) -> Any:
    """The field `name` of `TrainingArguments`, help and all, with another default."""
    return field(default=value, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


def answering_other_trainers(arguments: type[Arguments]) -> type[Arguments]:
    """Decorate a dataclass of arguments so that it takes, or answers in a sentence, what other trainers' have."""
    made: Any = arguments.__init__

    @functools.wraps(made)
    def init(self: Any, *positional: Any, **keywords: Any) -> None:
        known = [one.name for one in fields(arguments) if one.init]
        meant = translated(keywords, known)
        if "packing" in meant:
            meant["packing"] = packing_of(meant["packing"], keywords.get("packing_strategy"))
        made(self, *positional, **meant)

    setattr(arguments, "__init__", init)  # noqa: B010
    return arguments


@answering_other_trainers
@dataclass
class AdapterTrainingArguments(RunSettings, TrainingArguments):
    """`TrainingArguments` with the settings of a LoRA (`RunSettings`) and other defaults for a few of its own.

    Arguments of TRL's `SFTConfig` are taken, or answered as `porting.ANSWERS` says.

    Raises:
        ConfigurationError: a value that cannot be, or two that contradict each other.
    """

    lr_scheduler_type: SchedulerType | str = _with_default("lr_scheduler_type", "cosine")
    per_device_eval_batch_size: int = _with_default("per_device_eval_batch_size", 16)
    logging_steps: float = _with_default("logging_steps", 1)
    save_total_limit: int | None = _with_default("save_total_limit", 2)
    # The rich progress bar stands in for tqdm.
    disable_tqdm: bool | None = _with_default("disable_tqdm", True)
    # The proof has looked for parameters without gradients.
    ddp_find_unused_parameters: bool | None = _with_default("ddp_find_unused_parameters", False)

    def __post_init__(self) -> None:
        if not hasattr(self, "set_by_hand"):
            # The fields that differ from their defaults, before `TrainingArguments` fills any in.
            self.set_by_hand = differing(self)
        if isinstance(self.target_modules, list) and self.target_modules[:1] in [[name] for name in TARGET_GROUPS]:
            # A command line gives a list; alone, the name of a group stands for the group.
            self.target_modules = self.target_modules[0]
        self.packing = packing_of(self.packing)
        # TRL's older name of the loss that builds no logits.
        self.loss_type = "nll" if self.loss_type == "chunked_nll" else self.loss_type
        if self.use_liger_kernel:
            # Its kernels would be put into the model beside ours; of the loss there is one at a time.
            logger.warning(
                "use_liger_kernel is not needed here: the loss builds no logits. Its loss is loss_backend='liger'."
            )
            self.use_liger_kernel = False
        if self.alpha is None:
            self.alpha = 2 * self.rank
        self.added_tokens = token_texts(self.added_tokens)
        problems = problems_of({one.name: getattr(self, one.name) for one in fields(RunSettings)})
        if self.base_dtype is not None and not isinstance(getattr(torch, self.base_dtype, None), torch.dtype):
            problems.append(f"base_dtype is {self.base_dtype!r}, expected a dtype of torch such as float32")
        if problems:
            raise ConfigurationError("The training arguments cannot be used: " + "; ".join(problems) + ".")
        if not devices.pins_memory():
            # Pinning speeds up the copy to a GPU; without one torch warns in every epoch.
            self.dataloader_pin_memory = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            # Without it each process would take itself for the only one.
            self.use_cpu = True
        if self.deepspeed and "RANK" not in os.environ:
            # DeepSpeed expects a launcher; a process without one is a world of its own.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigurationError(f"The training arguments cannot be used: {error}") from error

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row there may be; a usual number where there is no limit."""
        return self.max_length or TYPICAL_LENGTH

    @classmethod
    def of(cls, args: TrainingArguments | None) -> "AdapterTrainingArguments":
        """`args` itself, or what a plain `TrainingArguments`, a `SFTConfig` or nothing at all stands for.

        Raises:
            ConfigurationError: something in it cannot be honoured here.
        """
        if isinstance(args, cls):
            return args
        if args is None:
            return cls(output_dir="tmp_trainer")
        by_hand = differing(args)
        given = {one.name: getattr(args, one.name) for one in fields(args) if one.init}
        # What another class of arguments has beyond transformers' own counts where it was set; its defaults are its own.
        foreign = set(given) - {one.name for one in fields(TrainingArguments)}
        known = {one.name for one in fields(cls)} | set(ANSWERS)
        own = {name for name in foreign if name not in known}
        taken = {name for name in given if name not in foreign or (name in by_hand and name not in own)}
        made = cls(**{name: given[name] for name in taken})
        for name in own:
            # A script's own: nobody here reads it, and the script may.
            setattr(made, name, given[name])
        made.set_by_hand = by_hand & {one.name for one in fields(cls)}
        return made

    def changed(self, **values: object) -> "AdapterTrainingArguments":
        """A copy with other values, which still knows what was set by hand in the original."""
        made: AdapterTrainingArguments = replace(self, **values)  # type: ignore[arg-type]
        made.set_by_hand = self.set_by_hand
        return made
