"""Trials of one recipe over ranges of its settings, all on one resident base; the best one's adapter is kept.

A range is `[4, 8, 16]`, one of these, or `{low: 1e-4, high: 1e-2, log: true}`, a number between two.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from adapterhub_lite.adapter_format.manifest import read_record
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.recipe import TrainingOutcome, held_out_rows, run_key, trainer_for
from adapterhub_lite.training.run.search_trainer import FIXED, read_trials
from adapterhub_lite.training.settings import TrainingRecipe

logger = logging.getLogger(__name__)
KEYS = {"low", "high", "log"}
# In the folder of a sweep, so that it can go on: the ranges it was asked for, and what optuna knows of its trials.
RANGES_FILE, STUDY_FILE = "ranges.json", "study.journal"


@dataclass(frozen=True)
class Range:
    """The values of one setting: `choices`, or numbers from `low` to `high`, spread by their logarithm with `log`."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def largest(self) -> Any:
        """The largest value; of words, the last."""
        return self.high if not self.choices else max(self.choices, key=lambda one: one if is_number(one) else 0)

    def described(self) -> str:
        """`2, 4 or 8`, `0.0001 to 0.01`."""
        if not self.choices:
            return f"{self.low:g} to {self.high:g}"
        *others, last = map(str, self.choices)
        return f"{', '.join(others)} or {last}" if others else last

    # What optuna calls a trial.
    def of(self, name: str, trial: Any) -> Any:
        """The value that a trial takes."""
        if self.choices:
            return trial.suggest_categorical(name, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: the best trial's adapter with its record, and every trial as `trials.jsonl` has it."""

    best: TrainingOutcome
    trials: list[dict[str, Any]]


def read_ranges(path: Path) -> dict[str, Range]:
    """The ranges in a YAML file, by the recipe's settings.

    Raises:
        ConfigurationError: the file cannot be read, a setting is unknown or cannot be searched, or a range is none.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} could not be read as YAML: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ConfigurationError(f"{path} contains no ranges: expected lines such as `rank: [4, 8, 16]`.")
    known = searchable()
    problems = [f"{name} cannot be searched" for name in found if name not in known]
    ranges = {}
    for name, value in found.items():
        try:
            ranges[str(name)] = range_of(value)
        except ValueError as error:
            problems.append(f"{name} is {value!r}, {error}")
    if problems:
        raise ConfigurationError(f"{path}: {'; '.join(map(str, problems))}. Known: {', '.join(sorted(known))}.")
    return ranges


def searchable() -> dict[str, str]:
    """The recipe's settings that may differ between trials: name -> name of the argument."""
    named = {one.name: one.metadata["setting"] for one in fields(TrainingRecipe) if "setting" in one.metadata}
    fixed = {*FIXED, "report_to", "save_steps", "on_out_of_memory"}
    return {name: argument for name, argument in named.items() if argument not in fixed}


def range_of(value: Any) -> Range:
    """A range as YAML has it.

    Raises:
        ValueError: it is none; the text says what was expected.
    """
    if isinstance(value, list) and value:
        return Range(choices=tuple(number(one) for one in value))
    if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= KEYS:
        low, high = number(value["low"]), number(value["high"])
        if is_number(low) and is_number(high) and low <= high and not (value.get("log") and low <= 0):
            return Range(low=low, high=high, log=bool(value.get("log")))
    raise ValueError("expected a list of values, or low, high and log with low at most high")


def is_number(value: object) -> bool:
    """Whether it is a number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> Any:
    """YAML reads 1e-4 as text; a number is meant."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def checked(rows: Any, recipe: TrainingRecipe, ranges: Mapping[str, Range], trials: int) -> tuple[Dataset, Dataset]:
    """(the rows to learn, those to compare trials by) of a sweep that can be run.

    Raises:
        ConfigurationError: there is nothing to compare trials by, a range has an impossible value, or optuna is missing.
        DataError: no rows are left to evaluate on.
    """
    if find_spec("optuna") is None:
        raise missing_extra("A sweep", "search")
    if trials < 1:
        raise ConfigurationError(f"trials is {trials}, expected 1 or more.")
    if recipe.report:
        raise ConfigurationError(
            "report compares base and adapter after one run. Leave it out, and use eval on the best."
        )
    for name, one in ranges.items():
        for value in one.choices or (one.low, one.high):
            # A value that no recipe takes is found before the first trial.
            replace(recipe, **{name: value})
    rows, held_out = held_out_rows(rows, recipe)
    if held_out is None:
        raise ConfigurationError("A sweep compares evaluations: give eval_data or validation_split.")
    if not len(held_out):
        raise DataError("No rows are left to evaluate on. Give more rows, or a larger validation_split.")
    return rows, held_out


def sweep(
    base: ResolvedBase,
    rows: Dataset,
    folder: Path,
    recipe: TrainingRecipe,
    ranges: Mapping[str, Range],
    trials: int,
    *,
    data_id: str | None = None,
    show_progress: bool = True,
) -> Sweep:
    """Run `trials` trials in a folder of their own under `folder`, each a clean adapter on the same resident base.

    One that was interrupted goes on with the trials that it lacks; the trial that it was in begins anew.

    Raises:
        ConfigurationError: there is nothing to compare trials by, a range has an impossible value, or optuna is missing.
        DataError: a row cannot be used.
    """
    rows, held_out = checked(rows, recipe, ranges, trials)
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = searchable()
    run = folder / f"sweep-{run_key(base, rows, recipe, held_out)}"
    done, asked = len(read_trials(run)), json.dumps({name: asdict(one) for name, one in ranges.items()}, sort_keys=True)
    kept = run / RANGES_FILE
    if run.is_dir() and any(run.iterdir()):
        if not kept.is_file() or kept.read_text(encoding="utf-8") != asked or done >= trials:
            raise ConfigurationError(
                f"There is a sweep of these rows and settings in {run} already. Remove it, change them, or ask for more trials."
            )
        logger.warning(f"The sweep in {run} goes on: {done} of {trials} trials are done.")
    trainer = trainer_for(base, rows, held_out, run, recipe, data_id=data_id, show_progress=show_progress)
    # What an interrupted sweep left is what this one goes on with.
    trainer.guard.was_there = []
    run.mkdir(parents=True, exist_ok=True)
    kept.write_text(asked, encoding="utf-8")
    journal = JournalFileBackend(str(run / STUDY_FILE))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {names[name]: one.of(names[name], trial) for name, one in ranges.items()},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=trials - done,
        direction="minimize",
        backend="optuna",
        # With the same seed it would draw the same again.
        sampler=optuna.samplers.TPESampler(seed=recipe.seed + done),
        storage=optuna.storages.JournalStorage(journal),
        study_name="sweep",
        load_if_exists=True,
    )
    record = read_record(trainer.best_adapter) if trainer.best_adapter is not None else None
    if trainer.best_adapter is None or record is None:
        raise ConfigurationError(f"None of {trials} trials came to an end with a finite loss. Narrow the ranges.")
    return Sweep(TrainingOutcome(trainer.best_adapter, record), read_trials(run))
