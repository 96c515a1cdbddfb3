"""What a run may be told, once: every `TrainingArguments` field, and the fields of an adapter's run."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from adapterhub_lite.errors import ConfigurationError

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
    rank: int = field(default=8, metadata={"help": "The rank of each LoRA pair."})
    alpha: int = field(default=16, metadata={"help": "The LoRA's alpha; the update is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of each LoRA pair."})
    target_modules: Any = field(
        default="all-linear", metadata={"help": "The linear layers that get a LoRA: names, or 'all-linear'."}
    )
    max_length: int = field(default=1024, metadata={"help": "The longest row in tokens."})
    overlong: Literal["refuse", "truncate", "drop"] = field(
        default="refuse", metadata={"help": "What becomes of longer rows: refuse, truncate (on the right) or drop."}
    )
    loss_chunk_tokens: int | None = field(
        default=None, metadata={"help": "Tokens a tile of the loss; None lets the loss choose."}
    )
    loss_backend: str = field(default="auto", metadata={"help": "Which loss implementation: auto, or one by name."})
    padding_free: bool = field(
        default=True, metadata={"help": "Lay the rows of a batch end to end, without padding, where the model can."}
    )
    fast_lora: bool = field(default=True, metadata={"help": "Use the leaner LoRA step where a layer allows it."})
    proof: bool = field(default=True, metadata={"help": "Prove data, loss and gradients in the first two steps."})
    preflight: bool = field(default=True, metadata={"help": "Try the longest batch before the first step."})
    show_progress: bool = field(default=True, metadata={"help": "Show the progress bar on the terminal."})

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1 or self.alpha < 1:
            problems.append(f"rank and alpha must be positive, not {self.rank} and {self.alpha}")
        if self.overlong not in OVERLONG:
            problems.append(f"overlong must be one of {', '.join(OVERLONG)}, not {self.overlong!r}")
        if self.max_length < 2:
            problems.append(f"max_length must be at least 2 tokens, not {self.max_length}")
        if not 0.0 <= self.lora_dropout < 1.0:
            problems.append(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if problems:
            raise ConfigurationError("The training arguments cannot be used: " + "; ".join(problems) + ".")
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigurationError(f"The training arguments cannot be used: {error}") from error
