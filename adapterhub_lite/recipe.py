"""The settings of one training run that people choose: the source of `train`'s options and of its YAML keys.

Standard library only, so that `adapterhub-lite train --help` starts at once.
"""

from dataclasses import dataclass
from typing import Literal

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.setting import setting


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

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "accumulation", "rank", "max_length", "save_steps")
        problems = [
            f"{name} is {getattr(self, name)}, wanted 1 or more" for name in at_least_one if getattr(self, name) < 1
        ]
        if self.learning_rate <= 0:
            problems.append(f"learning_rate is {self.learning_rate}, wanted more than 0")
        if self.alpha < 0:
            problems.append(f"alpha is {self.alpha}, wanted 0 or more")
        for name, allowed in (
            ("target_modules", ("all-linear", "attention", "mlp")),
            ("overlong", ("refuse", "truncate", "drop")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}, wanted one of {', '.join(allowed)}")
        if problems:
            raise ConfigurationError("These settings cannot be: " + "; ".join(problems) + ".")
