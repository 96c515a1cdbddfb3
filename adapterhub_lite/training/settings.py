"""Every setting of a run, described once: name, type, default, help and range. Knows no torch, so that `--help` starts at once.

`RunSettings` holds what a run may be told beyond transformers' own arguments, and those of transformers' whose default is
another here; `AdapterTrainingArguments` is `TrainingArguments` with these fields. `TrainingRecipe` and `PlanRequest` are
selections of them: the options of `train` and `plan`, and `train`'s YAML keys.

The learning rate and alpha are the best of six combinations on the two example tasks that leave LoRA+ off (LoRA+ at half
the rate was level); a checkpoint takes a fifth of a step, so that one in 50 costs under 1 %. Measured by
`scripts/bench/train/defaults.py`, see `scripts/bench/results/training_defaults.json`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.setting import setting

# Where a run may report to, and the packages of which one is needed for it.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
MAX_TEMPLATE_BYTES = 256 << 10
TARGET_GROUPS = ("all-linear", "attention", "mlp")
PACKINGS = ("none", "bfd", "bfd_split", "wrapped")
# What is assumed of rows that have no limit and cannot be counted.
TYPICAL_LENGTH = 1024
INITS = r"default|gaussian|orthogonal|pissa|pissa_niter_\d+"


@dataclass
class RunSettings:
    """The settings of an adapter's run, by the names that `AdapterTrainingArguments` gives them."""

    max_steps: int = setting(-1, "Optimizer steps; -1 means as many as the epochs take.")
    num_train_epochs: float = setting(3.0, "Passes over the rows, unless a number of steps is given.")
    per_device_train_batch_size: int = setting(16, "Rows per step on each device.")
    gradient_accumulation_steps: int = setting(1, "Batches added up before each optimizer step.")
    learning_rate: float = setting(2e-3, "Peak learning rate of the adapter.")
    warmup_steps: float = setting(0.05, "Steps of warm-up; below 1, a share of the run.")
    rank: int = setting(8, "Rank of each LoRA pair.")
    alpha: int | None = setting(
        None, "LoRA alpha: the update is scaled by alpha / rank. Twice the rank when not given."
    )
    lora_dropout: float = setting(0.0, "Dropout on the input of each LoRA pair.")
    # HfArgumentParser hands the metadata to argparse, which would give a list without a default.
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={"help": "Modules to adapt: all-linear, attention or mlp.", "default": "all-linear"},
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = setting(False, "Learn the magnitude of each weight separately (DoRA).")
    loraplus_lr_ratio: float | None = setting(
        None, "Learning rate of B divided by that of A (LoRA+); one rate for both when not given."
    )
    init_lora: str = setting("default", "How A and B begin: default, gaussian, orthogonal, pissa or pissa_niter_N.")
    max_length: int | None = setting(1024, "Longest row, in tokens; no limit when None.")
    overlong: Literal["refuse", "truncate", "truncate_start", "drop"] = setting(
        "refuse", "What becomes of a longer row: refuse, truncate (its end), truncate_start or drop."
    )
    packing: str = setting(
        "none",
        "Fill rows of a batch to max_length: none, bfd (whole rows), bfd_split (longer ones cut) or wrapped (cut).",
    )
    seed: int = setting(42, "Seed of the adapter and of the order of rows.")
    save_steps: float = setting(50, "Optimizer steps between checkpoints; below 1, a share of the run.")
    memory_preset: str = setting("auto", "A memory preset by name; auto plans one for this machine and these rows.")
    base_dtype: str | None = setting(
        None, "Dtype the base is loaded in (float32, ...); that of the preset when not given."
    )
    master_weights: bool = setting(
        True, "Keep fp32 copies of what is trained in 16 bits, so that no small step is rounded away."
    )
    on_out_of_memory: Literal["stop", "replan"] = setting(
        "stop", "When memory runs out: stop and say what fits, or replan with less and go on."
    )
    loss_chunk_tokens: int | None = setting(None, "Tokens per tile of the loss; chosen by the loss when not given.")
    loss_backend: str = setting("auto", "Which loss: auto, tiled, full, model, triton, cut_cross_entropy or liger.")
    padding_free: bool = setting(True, "Lay the rows of a batch end to end, without padding, where the model can.")
    fast_lora: bool = setting(True, "Use the leaner LoRA step where a layer allows it.")
    proof: bool = setting(True, "Prove data, loss and gradients in the first two steps.")
    preflight: bool = setting(True, "Try the longest batch before the first step.")
    show_progress: bool = setting(True, "Show the progress bar on the terminal.")
    dataset_text_field: str | None = setting(None, "Column of plain text, where it is not called text.")
    completion_only_loss: bool | None = setting(None, "Learn the completion alone; False learns the prompt too.")
    assistant_only_loss: bool | None = setting(None, "Learn the assistant's turns alone; False learns the whole chat.")
    chat_template_path: str | None = setting(None, "Chat template instead of the base's: a Jinja file or a folder.")
    eos_token: str | None = setting(None, "Token that ends an answer, where it is not the tokenizer's own.")
    pad_token: str | None = setting(None, "Token that fills padded batches, where it is not the tokenizer's own.")
    added_tokens: None | str | list[str] = setting(  # noqa: RUF036
        None, "Tokens of the adapter's own that its base has not, whose rows are trained; several with commas."
    )
    pad_to_multiple_of: int | None = setting(None, "Pad each batch to a multiple of so many tokens.")
    shuffle_dataset: bool = setting(False, "Shuffle the rows by the seed before anything else.")
    loss_type: str = setting(
        "nll",
        "What is learned of a token: nll, or dft (weighed by its likelihood, arXiv:2508.05629); evaluations report nll.",
    )
    router_aux_loss_coef: float | None = setting(
        None, "Weight of the router loss of mixture-of-experts models; that of the model when not given."
    )
    # In transformers' order, which its HfArgumentParser depends on.
    report_to: None | str | list[str] = setting(  # noqa: RUF036
        "none", "Also report to tensorboard, trackio, wandb or mlflow; several with commas."
    )


# The least value of a setting that must not be smaller.
AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "rank": 1,
    "alpha": 1,
    "max_length": 2,
    "loss_chunk_tokens": 1,
    "pad_to_multiple_of": 1,
    "router_aux_loss_coef": 0,
}
POSITIVE = ("learning_rate", "save_steps", "loraplus_lr_ratio", "num_train_epochs")
CHOICES: dict[str, tuple[str, ...]] = {
    "overlong": ("refuse", "truncate", "truncate_start", "drop"),
    "on_out_of_memory": ("stop", "replan"),
}
LOSS_TYPES = ("nll", "dft")


def token_texts(given: str | list[str] | None) -> list[str] | None:
    """The texts of `added_tokens`, each alone; None without any."""
    texts = given.split(",") if isinstance(given, str) else given or []
    return [text for one in texts if (text := one.strip())] or None


def problems_of(values: Mapping[str, Any], shown: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with `values`, settings by their names in `RunSettings`, one clause each; `shown` renames them."""

    def clause(name: str, wanted: str) -> str:
        return f"{(shown or {}).get(name, name)} is {values[name]!r}, expected {wanted}"

    given = {name: value for name, value in values.items() if value is not None}
    problems = [clause(n, f"{least} or more") for n, least in AT_LEAST.items() if n in given and given[n] < least]
    problems += [clause(name, "more than 0") for name in POSITIVE if name in given and given[name] <= 0]
    problems += [
        clause(name, f"one of {', '.join(allowed)}")
        for name, allowed in CHOICES.items()
        if name in given and given[name] not in allowed
    ]
    if given.get("loss_type", "nll") not in LOSS_TYPES:
        problems.append(clause("loss_type", f"one of {', '.join(LOSS_TYPES)}"))
    if given.get("packing", "none") not in PACKINGS:
        problems.append(clause("packing", f"one of {', '.join(PACKINGS)}"))
    if given.get("packing", "none") != "none" and values.get("max_length", 1) is None:
        problems.append("packing fills rows up to max_length, expected a number there")
    if not re.fullmatch(INITS, given.get("init_lora", "default")):
        problems.append(clause("init_lora", "default, gaussian, orthogonal, pissa or pissa_niter_N"))
    texts = token_texts(given.get("added_tokens")) or []
    if len(set(texts)) < len(texts):
        problems.append(clause("added_tokens", "each token once"))
    if not 0.0 <= given.get("lora_dropout", 0.0) < 1.0:
        problems.append(clause("lora_dropout", "at least 0 and less than 1"))
    return problems


def same_as(name: str) -> Any:
    """Return a dataclass field that is the setting `name` of `RunSettings`: its default, its help."""
    described = next(one for one in fields(RunSettings) if one.name == name)
    return field(default=described.default, metadata={"help": described.metadata["help"], "setting": name})


@dataclass(frozen=True)
class RowSettings:
    """How rows are read: which columns, what of them, with which arguments of the chat template.

    Raises:
        ConfigurationError: two settings contradict each other, or one cannot be read.
    """

    data_config: str = setting("", "Configuration of a data set on the Hub.")
    data_split: str = setting("train", "Split of a data set on the Hub, or of a folder.")
    prompt_column: str = setting("", "Column of raw text that is asked, where its name does not say so.")
    completion_column: str = setting("", "Column of raw text that is learned.")
    template: str = setting(
        "", 'Text over columns, as "Q: {question}\\n": the prompt where there is a completion column, else all.'
    )
    ignore_columns: str = setting("", "Keys of rows, turns or parts that may be left out; several with commas.")
    chat_template_kwargs: str = setting(
        "", 'Arguments of the chat template for every row, as JSON: {"thinking": false}.'
    )

    def __post_init__(self) -> None:
        if self.prompt_column and self.template:
            raise ConfigurationError("Give either a prompt column or a template: both make the prompt.")
        if self.prompt_column and not self.completion_column:
            raise ConfigurationError("A prompt column needs a completion column.")
        if self.completion_column and not (self.prompt_column or self.template):
            raise ConfigurationError("A completion column needs a prompt column, or a template that makes the prompt.")
        self.template_arguments()

    def ignored(self) -> frozenset[str]:
        """The keys that may be left out."""
        return frozenset(name.strip() for name in self.ignore_columns.split(",") if name.strip())

    def template_arguments(self) -> dict[str, Any]:
        """The chat template's arguments for every row."""
        if not self.chat_template_kwargs:
            return {}
        try:
            found = json.loads(self.chat_template_kwargs)
        except ValueError as error:
            raise ConfigurationError(f"chat_template_kwargs is no JSON: {error}.") from error
        if not isinstance(found, dict):
            raise ConfigurationError('chat_template_kwargs must be a JSON object, such as {"thinking": false}.')
        return found


@dataclass(frozen=True)
class DataSettings(RowSettings):
    """What a person may say of the rows of a run beyond where they are.

    Raises:
        ConfigurationError: two settings contradict each other, or one cannot be read.
    """

    chat_template: str = setting(
        "", "File with a chat template (Jinja) instead of the base's; it goes with the adapter."
    )
    unlearnable: Literal["refuse", "drop"] = setting(
        "refuse", "A row of which a cut leaves nothing to learn: refuse or drop."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unlearnable not in ("refuse", "drop"):
            raise ConfigurationError(f"unlearnable is {self.unlearnable!r}, expected refuse or drop.")

    def chat_template_text(self) -> str | None:
        """The chat template to use instead of the base's; None without one.

        Raises:
            ConfigurationError: the file cannot be read.
        """
        if not self.chat_template:
            return None
        path = Path(self.chat_template).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"The chat template {path} cannot be read: {error.strerror}.") from error
        if not content.strip() or len(content) > MAX_TEMPLATE_BYTES:
            raise ConfigurationError(
                f"{path} holds no chat template: expected 1 to {MAX_TEMPLATE_BYTES} bytes of Jinja."
            )
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start}).") from error


@dataclass(frozen=True)
class TrainingRecipe(DataSettings):
    """What `train` lets people choose; everything else is `AdapterTrainingArguments`.

    Raises:
        ConfigurationError: a value out of range; the text names all of them.
    """

    steps: int = same_as("max_steps")
    epochs: float = same_as("num_train_epochs")
    batch_size: int = same_as("per_device_train_batch_size")
    accumulation: int = same_as("gradient_accumulation_steps")
    learning_rate: float = same_as("learning_rate")
    warmup: float = same_as("warmup_steps")
    rank: int = same_as("rank")
    alpha: int | None = same_as("alpha")
    target_modules: str = same_as("target_modules")
    max_length: int | None = same_as("max_length")
    packing: str = same_as("packing")
    overlong: Literal["refuse", "truncate", "truncate_start", "drop"] = same_as("overlong")
    seed: int = same_as("seed")
    save_steps: float = same_as("save_steps")
    memory_preset: str = same_as("memory_preset")
    on_out_of_memory: Literal["stop", "replan"] = same_as("on_out_of_memory")
    use_rslora: bool = same_as("use_rslora")
    use_dora: bool = same_as("use_dora")
    loraplus_lr_ratio: float | None = same_as("loraplus_lr_ratio")
    report_to: str = same_as("report_to")
    init_lora: str = same_as("init_lora")
    added_tokens: str | None = same_as("added_tokens")
    early_stopping: int = setting(
        0, "Stop after so many evaluations in a row without a lower loss, and keep the best; 0 goes on to the end."
    )
    samples: int = setting(0, "Held-out rows to answer at each evaluation: shown, and kept in samples.jsonl.")
    report: int = setting(
        0, "Held-out rows that base and adapter answer at the end; with their losses it is kept in report.json."
    )
    eval_data: str = setting("", "Rows to evaluate on during the run: a file, a folder or a data set's id on the Hub.")
    validation_split: float = setting(0.0, "Share of the rows to hold out and evaluate on, such as 0.1.")

    def arguments(self) -> dict[str, Any]:
        """The settings by their names in `AdapterTrainingArguments`."""
        return {one.metadata["setting"]: getattr(self, one.name) for one in fields(self) if "setting" in one.metadata}

    def __post_init__(self) -> None:
        super().__post_init__()
        shown = {one.metadata["setting"]: one.name for one in fields(self) if "setting" in one.metadata}
        problems = problems_of(self.arguments(), shown)
        if not 0.0 <= self.validation_split < 1.0:
            problems.append(f"validation_split is {self.validation_split}, expected at least 0 and less than 1")
        if self.eval_data and self.validation_split:
            problems.append("eval_data and validation_split both say what is evaluated on, expected one of them")
        for name in ("early_stopping", "samples", "report"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}, expected 0 or more")
            if getattr(self, name) and not (self.eval_data or self.validation_split):
                problems.append(f"{name} looks at evaluations, expected eval_data or validation_split too")
        if self.steps < 1 and self.steps != -1:
            problems.insert(0, f"steps is {self.steps}, expected 1 or more, or -1 to go by epochs")
        if self.target_modules not in TARGET_GROUPS:
            problems.append(f"target_modules is {self.target_modules!r}, expected one of {', '.join(TARGET_GROUPS)}")
        unknown = set(self.report_to.split(",")) - {*REPORTERS, "none"}
        if unknown:
            problems.append(f"report_to has {', '.join(sorted(unknown))!r}, expected {', '.join(REPORTERS)} or none")
        if problems:
            raise ConfigurationError("These settings cannot be used: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class PlanRequest:
    """What `plan` is asked about: one update on each device.

    Raises:
        ConfigurationError: a value out of range; the text names all of them.
    """

    batch_size: int = same_as("per_device_train_batch_size")
    sequence_length: int = setting(1024, "Longest row, in tokens; longer ones of --data count as this.")
    rank: int = same_as("rank")
    target_modules: str = same_as("target_modules")
    preset: str = setting("auto", "A memory preset by name; auto chooses.")
    devices: int = setting(1, "How many devices.")
    nodes: int = setting(1, "Machines with as many devices each.")
    node_rank: int = setting(0, "Which machine an accelerate config is for, from 0.")
    main_address: str = setting("", "Address of machine 0, for an accelerate config.")
    device_memory: str = setting("", "What each device has, for example 16GiB; this machine's when not given.")

    def __post_init__(self) -> None:
        numbers = ("batch_size", "sequence_length", "rank", "devices", "nodes")
        problems = [
            f"{name} is {getattr(self, name)}, expected 1 or more" for name in numbers if getattr(self, name) < 1
        ]
        if self.target_modules not in TARGET_GROUPS:
            problems.append(f"target_modules is {self.target_modules!r}, expected one of {', '.join(TARGET_GROUPS)}")
        if problems:
            raise ConfigurationError("These settings cannot be used: " + "; ".join(problems) + ".")
