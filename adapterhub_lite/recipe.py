"""The settings that people choose: the source of the options of `train` and `plan`, and of `train`'s YAML keys.

Standard library only, so that `adapterhub-lite train --help` starts at once.
"""

from dataclasses import dataclass
from typing import Literal

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.setting import setting

# Where a run may report to, and the packages of which one is needed for it.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


@dataclass(frozen=True)
class TrainingRecipe:
    """What `train` lets people choose; everything else is `AdapterTrainingArguments`.

    Raises:
        ConfigurationError: a value out of range; the text names all of them.
    """

    steps: int = setting(60, "Optimizer steps.")
    batch_size: int = setting(16, "Rows a step and device.")
    accumulation: int = setting(1, "Batches added up before each step.")
    learning_rate: float = setting(2e-3, "Peak learning rate.")
    rank: int = setting(8, "LoRA rank.")
    alpha: int = setting(0, "LoRA alpha; 0 means twice the rank.")
    target_modules: str = setting("all-linear", "Modules to adapt: all-linear, attention or mlp.")
    max_length: int = setting(1024, "Longest row, in tokens.")
    overlong: Literal["refuse", "truncate", "drop"] = setting("refuse", "A longer row: refuse, truncate or drop.")
    seed: int = setting(0, "Seed of adapter and data order.")
    save_steps: int = setting(25, "Optimizer steps between checkpoints.")
    memory_preset: str = setting("auto", "A memory preset by name; auto plans one for this machine and these rows.")
    on_out_of_memory: Literal["stop", "replan"] = setting("stop", "Out of memory: stop, or replan with less and go on.")
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = setting(False, "Learn each weight's magnitude apart (DoRA).")
    loraplus_lr_ratio: float = setting(0.0, "Learning rate of B over that of A (LoRA+); 0 means one rate.")
    report_to: str = setting("none", "Also report to tensorboard, trackio, wandb or mlflow; several with commas.")
    init_lora: str = setting("default", "How A and B begin: default, gaussian, orthogonal, pissa or pissa_niter_N.")

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "accumulation", "rank", "max_length", "save_steps")
        problems = [
            f"{name} is {getattr(self, name)}, wanted 1 or more" for name in at_least_one if getattr(self, name) < 1
        ]
        if self.learning_rate <= 0:
            problems.append(f"learning_rate is {self.learning_rate}, wanted more than 0")
        if self.loraplus_lr_ratio < 0:
            problems.append(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}, wanted 0 or more")
        if self.alpha < 0:
            problems.append(f"alpha is {self.alpha}, wanted 0 or more")
        unknown = set(self.report_to.split(",")) - {*REPORTERS, "none"}
        if unknown:
            problems.append(f"report_to has {', '.join(sorted(unknown))!r}, wanted {', '.join(REPORTERS)} or none")
        for name, allowed in (
            ("target_modules", ("all-linear", "attention", "mlp")),
            ("overlong", ("refuse", "truncate", "drop")),
            ("on_out_of_memory", ("stop", "replan")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")
        if problems:
            raise ConfigurationError("These settings cannot be: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class PlanRequest:
    """What `plan` is asked about: one update on each device.

    Raises:
        ConfigurationError: a value out of range; the text names all of them.
    """

    batch_size: int = setting(16, "Rows an update, on each device.")
    sequence_length: int = setting(1024, "Longest row, in tokens; longer ones of --data count as this.")
    rank: int = setting(8, "LoRA rank.")
    target_modules: str = setting("all-linear", "Modules to adapt: all-linear, attention or mlp.")
    preset: str = setting("auto", "A memory preset by name; auto chooses.")
    devices: int = setting(1, "How many devices.")
    nodes: int = setting(1, "Machines with as many devices each.")
    node_rank: int = setting(0, "Which machine an accelerate config is for, from 0.")
    main_address: str = setting("", "Address of machine 0, for an accelerate config.")
    device_memory: str = setting("", "What each device has, for example 16GiB; this machine's when not given.")

    def __post_init__(self) -> None:
        numbers = ("batch_size", "sequence_length", "rank", "devices", "nodes")
        problems = [f"{name} is {getattr(self, name)}, wanted 1 or more" for name in numbers if getattr(self, name) < 1]
        if self.target_modules not in ("all-linear", "attention", "mlp"):
            problems.append(f"target_modules is {self.target_modules!r}, wanted one of all-linear, attention, mlp")
        if problems:
            raise ConfigurationError("These settings cannot be: " + "; ".join(problems) + ".")
