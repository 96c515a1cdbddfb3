"""What a run may be told, once: every `TrainingArguments` field, and the fields of an adapter's run."""

import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from adapterhub_lite.errors import ConfigurationError

INITS = r"default|gaussian|orthogonal|pissa|pissa_niter_\d+"
OVERLONG = ("refuse", "truncate", "drop")


@dataclass
class AdapterTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit a LoRA on one machine, and the fields of the LoRA itself.

    Raises:
        ConfigurationError: a value that cannot be, or two that contradict each other.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate of the adapter."})
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "The shape of the learning rate over the run."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or below 1 a share of the run."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows a step on each device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Rows an evaluation step on each device."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of metrics.jsonl."})
    save_steps: float = field(default=50, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; the oldest goes first."})
    report_to: Any = field(default="none", metadata={"help": "Integrations to report to."})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "The rich progress bar stands in for tqdm."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches for a faster copy to a GPU."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without gradients in each step; the proof has done it."}
    )
    rank: int = field(default=8, metadata={"help": "The rank of each LoRA pair."})
    alpha: int | None = field(
        default=None,
        metadata={"help": "The LoRA's alpha; the update is scaled by alpha / rank. None is twice the rank."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of each LoRA pair."})
    target_modules: Any = field(
        default="all-linear",
        metadata={"help": "The linear layers that get a LoRA: all-linear, attention, mlp, or a list of names."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) (rsLoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Learn each weight's magnitude apart (DoRA)."})
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of B over that of A (LoRA+); None is one rate for both."}
    )
    init_lora: str = field(
        default="default",
        metadata={"help": "How A and B begin: default, gaussian, orthogonal, pissa or pissa_niter_N."},
    )
    memory_preset: str = field(
        default="auto", metadata={"help": "A memory preset by name; auto plans one for this machine and these rows."}
    )
    base_dtype: str | None = field(
        default=None, metadata={"help": "The dtype the base is loaded in (float32, ...); None is that of the preset."}
    )
    on_out_of_memory: Literal["stop", "replan"] = field(
        default="stop",
        metadata={"help": "When memory runs out: stop and say what fits, or replan with less and go on."},
    )
    max_length: int = field(default=1024, metadata={"help": "The longest row in tokens."})
    overlong: Literal["refuse", "truncate", "drop"] = field(
        default="refuse", metadata={"help": "What becomes of longer rows: refuse, truncate (on the right) or drop."}
    )
    loss_chunk_tokens: int | None = field(
        default=None, metadata={"help": "Tokens a tile of the loss; None lets the loss choose."}
    )
    loss_backend: str = field(
        default="auto", metadata={"help": "Which loss: auto, tiled, full, model, cut_cross_entropy or liger."}
    )
    padding_free: bool = field(
        default=True, metadata={"help": "Lay the rows of a batch end to end, without padding, where the model can."}
    )
    fast_lora: bool = field(default=True, metadata={"help": "Use the leaner LoRA step where a layer allows it."})
    proof: bool = field(default=True, metadata={"help": "Prove data, loss and gradients in the first two steps."})
    preflight: bool = field(default=True, metadata={"help": "Try the longest batch before the first step."})
    show_progress: bool = field(default=True, metadata={"help": "Show the progress bar on the terminal."})

    def __post_init__(self) -> None:
        problems = []
        if not hasattr(self, "set_by_hand"):
            self.set_by_hand = _changed(self)
        if self.alpha is None:
            self.alpha = 2 * self.rank
        if self.rank < 1 or self.alpha < 1:
            problems.append(f"rank and alpha must be positive, not {self.rank} and {self.alpha}")
        if self.on_out_of_memory not in ("stop", "replan"):
            problems.append(f"on_out_of_memory must be stop or replan, not {self.on_out_of_memory!r}")
        if self.base_dtype is not None and not isinstance(getattr(torch, self.base_dtype, None), torch.dtype):
            problems.append(f"base_dtype must be a dtype of torch such as float32, not {self.base_dtype!r}")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio <= 0:
            problems.append(f"loraplus_lr_ratio must be positive, not {self.loraplus_lr_ratio}")
        if not re.fullmatch(INITS, self.init_lora):
            problems.append(
                f"init_lora must be default, gaussian, orthogonal, pissa or pissa_niter_N, not {self.init_lora!r}"
            )
        if self.overlong not in OVERLONG:
            problems.append(f"overlong must be one of {', '.join(OVERLONG)}, not {self.overlong!r}")
        if self.max_length < 2:
            problems.append(f"max_length must be at least 2 tokens, not {self.max_length}")
        if not 0.0 <= self.lora_dropout < 1.0:
            problems.append(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if problems:
            raise ConfigurationError("The training arguments cannot be used: " + "; ".join(problems) + ".")
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

    def changed(self, **values: Any) -> "AdapterTrainingArguments":
        """A copy with other values, which still knows what was set by hand in the original."""
        made = replace(self, **values)
        made.set_by_hand = self.set_by_hand
        return made


def _changed(args: AdapterTrainingArguments) -> frozenset[str]:
    """The fields whose values are not their defaults; looked at before `TrainingArguments` fills any in."""
    found = set()
    for one in fields(args):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if one.init and getattr(args, one.name) != default:
            found.add(one.name)
    return frozenset(found)
