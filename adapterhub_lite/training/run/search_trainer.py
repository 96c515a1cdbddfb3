"""The `Trainer` that searches: each trial is a clean adapter, and where no `model_init` is given, all share one resident base.

Knows how an adapter is made anew and which trial was the best; the search itself is transformers' (optuna).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.trainer_utils import TrainOutput, default_compute_objective

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.training.model.adapters import open_base
from adapterhub_lite.training.model.assembly import adapted_again, assemble
from adapterhub_lite.training.run.record import save_adapter
from adapterhub_lite.training.run.rows_trainer import RowsTrainer
from adapterhub_lite.training.run.step_loss import StepLoss
from adapterhub_lite.training.settings import RunSettings, problems_of

TRIALS_FILE = "trials.jsonl"
# Settled when the trainer was made: rows are tokens by then, and memory is planned.
FIXED = frozenset(
    {
        "max_length",
        "overlong",
        "packing",
        "memory_preset",
        "base_dtype",
        "padding_free",
        "shuffle_dataset",
        "output_dir",
    }
    | {
        "dataset_text_field",
        "completion_only_loss",
        "assistant_only_loss",
        "chat_template_path",
        "eos_token",
        "pad_token",
    }
)
OF_THE_LORA = frozenset({"rank", "alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora"})


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """Every trial of the search whose output folder this is: number, objective, settings, steps, seconds."""
    path = folder / TRIALS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def objective_of(metrics: dict[str, float]) -> float:
    """What transformers compares by default, the loss or else the sum of the user's metrics, without what we add to them."""
    own = ("_token_accuracy", "_entropy", "_tokens", "_router_loss")
    return float(default_compute_objective({name: value for name, value in metrics.items() if not name.endswith(own)}))


class SearchTrainer(RowsTrainer):
    """A `RowsTrainer` that can make its adapter anew, and keeps the best trial of a search with its record.

    After `hyperparameter_search`, `best_adapter` is the folder of the best trial's adapter, and `trials.jsonl` in the
    output folder has a line for each.
    """

    best_adapter: Path | None = None
    _peft_config: PeftConfig | None = None
    # The user's `model_init`, with or without a parameter for the trial; None where the resident base is used.
    _user_init: Callable[..., Any] | None = None
    _initial: dict[str, Tensor] | None = None
    _direction: Any = None
    _best: float | None = None
    # What the search compares: a number, or several.
    objective: Any = None

    # A trial is the search library's own; so is whatever a model_init returns.
    def call_model_init(self, trial: Any = None) -> Any:
        """The model of a trial, with a clean adapter; the settings of the trial are set before."""
        if not hasattr(self, "assembly"):
            # transformers' type leaves out names and folders.
            self.model_init = self._user_init  # type: ignore[assignment]
            return super().call_model_init(trial)
        if trial is not None:
            self._set(trial)
        if self._user_init is not None:
            self._assemble(super().call_model_init(trial))
        elif self._initial is not None:
            for name, parameter in self.assembly.model.named_parameters():
                if name in self._initial:
                    parameter.data.copy_(self._initial[name])
        else:
            self.assembly = adapted_again(
                self.assembly, self.opened, self.args, self._peft_config, self.memory_choice.preset, self.rows_read_by
            )
        self.step_loss = StepLoss(self.assembly, self.args)
        return self.assembly.model

    def _assemble(self, model: Any) -> None:
        choice = self.memory_choice
        self.opened = replace(open_base(model, None, self.processing_class), added=self.opened.added)
        self.base = self.opened.base
        self.assembly = assemble(
            self.opened,
            self.args,
            self._peft_config,
            choice.preset,
            choice.attention.partition(":")[0],
            self.rows_read_by,
        )

    def _set(self, trial: Any) -> None:
        params: dict[str, Any] = dict(self.hp_space(trial)) if not isinstance(trial, dict) else trial
        unknown = [name for name in params if not hasattr(self.args, name)]
        given = self._initial is not None or self._peft_config is not None
        fixed = [name for name in params if name in FIXED or (given and name in OF_THE_LORA)]
        if unknown or fixed:
            named = "; ".join(
                [f"there is no argument {name}" for name in unknown]
                + [f"{name} is settled before the first trial" for name in fixed]
            )
            raise ConfigurationError(f"This cannot be searched: {named}.")
        for name, value in params.items():
            old = getattr(self.args, name)
            setattr(self.args, name, value if old is None else type(old)(value))
        if "rank" in params and "alpha" not in params and "alpha" not in self.args.set_by_hand:
            self.args.alpha = 2 * self.args.rank
        problems = problems_of({name: getattr(self.args, name) for name in RunSettings.__dataclass_fields__})
        if problems:
            raise ConfigurationError("A trial cannot be run: " + "; ".join(problems) + ".")

    # The arguments are transformers' own.
    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Search as the `Trainer` does; without a `model_init`, each trial is a fresh adapter on the base in memory.

        Raises:
            ConfigurationError: there is nothing to search by (no eval_dataset, no optuna), or no fresh adapter can be made.
        """
        if self.eval_dataset is None:
            raise ConfigurationError("A search compares evaluations: give an eval_dataset.")
        if self.model_init is None:
            if isinstance(self.opened.model, PeftModel):
                named = self.assembly.model.named_parameters()
                self._initial = {name: one.detach().clone() for name, one in named if one.requires_grad}
            self.model_init = lambda: None
        if len(args) < 2:
            kwargs["compute_objective"] = kwargs.get("compute_objective") or objective_of
        self._direction = kwargs.get("direction", args[3] if len(args) > 3 else "minimize")
        # Of a search that goes on, what it had found.
        kept = [one for one in read_trials(self._output()) if (self._output() / one.get("adapter", "?")).is_dir()]
        self._best = kept[-1]["objective"] if kept else None
        self.best_adapter = self._output() / kept[-1]["adapter"] if kept else None
        try:
            return super().hyperparameter_search(*args, **kwargs)
        except RuntimeError as error:
            if "backend" in str(error).lower() and "available" in str(error).lower():
                raise missing_extra("A search", "search") from error
            raise

    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def keep_trial(self, trial: Any, output: TrainOutput) -> None:
        """Write down what became of a trial, and keep its adapter if it is the best so far. Every process calls it."""
        if self.objective is None:
            self.objective = self.compute_objective(self.evaluate())
        objective = self.objective
        number = getattr(trial, "number", None)
        params = dict(getattr(trial, "params", None) or {})
        line = {"trial": number, "objective": objective, "settings": params, "steps": output.global_step}
        line["seconds"] = round(float(output.metrics.get("train_runtime", 0.0)), 1)
        folder = self._output()
        several = not isinstance(objective, int | float)
        better = not several and (
            self._best is None or (objective < self._best if self._direction == "minimize" else objective > self._best)
        )
        if better and self.memory_choice.preset.trains == "lora":
            kept = folder / f"best-of-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            save_adapter(self, kept)
            if self.best_adapter is not None and self.args.should_save:
                shutil.rmtree(self.best_adapter, ignore_errors=True)
            self._best, self.best_adapter = objective, kept
            line["adapter"] = kept.name
        if self.args.should_save:
            with (folder / TRIALS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")
