"""From a recipe to an adapter folder: one run, which goes on from its last checkpoint if it was interrupted."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from adapterhub_lite.adapter_format.record import TrainingRecord, read_record
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, RunStoppedError
from adapterhub_lite.tasks import get_task
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.settings import REPORTERS, TrainingRecipe
from adapterhub_lite.training.trainer import AdapterTrainer

# Rows drawn from an example task by default, and at the most; longer runs see them again.
TASK_ROWS, MOST_TASK_ROWS = 320, 2000


@dataclass(frozen=True)
class TrainingOutcome:
    """A finished run: the adapter's folder (plain PEFT) and the record of how it came about."""

    folder: Path
    record: TrainingRecord


def rows_for(data: str | None, task: str | None, recipe: TrainingRecipe) -> tuple[Any, str]:
    """Return the training rows and the name they go by in the record.

    Raises:
        ConfigurationError: both `data` and `task` were given, or neither.
        DataError: the data cannot be used.
    """
    if (data is None) == (task is None):
        raise ConfigurationError("Give either --data (a JSONL file or a Hub id) or --task (an example task).")
    if data is not None:
        return load_rows(data), Path(data).name if Path(data).exists() else data
    # By epochs, a task is as long as its rows are drawn.
    count = TASK_ROWS if recipe.steps < 0 else recipe.steps * recipe.batch_size * recipe.accumulation
    example = get_task(str(task))
    return example.rows(min(count, MOST_TASK_ROWS), seed=recipe.seed), f"adapterhub-lite/tasks/{example.name}"


def train_adapter(
    base: ResolvedBase,
    rows: Sequence[dict[str, Any]] | Any,
    folder: str | Path,
    recipe: TrainingRecipe,
    *,
    data_id: str | None = None,
    show_progress: bool = True,
) -> TrainingOutcome:
    """Train on `rows` (anything `load_rows` takes) and return the adapter, in a run folder of its own under `folder`.

    The same base, rows and settings are the same run: a finished one is returned as it is, an interrupted one goes on
    from its last checkpoint.

    Raises:
        DataError: a row cannot be used.
        RunStoppedError: SIGTERM came before the last step.
        TrainingError: the run stopped because going on would be wrong.
    """
    rows = load_rows(rows)
    run = Path(folder) / run_key(base, rows, recipe)
    finished = read_record(run / "adapter")
    if finished is not None:
        return TrainingOutcome(run / "adapter", finished)
    chosen = {**recipe.arguments(), "report_to": _reporters(recipe.report_to)}
    # A run publishes nothing that was not asked for: the default makes a Space of the run's figures at its end.
    arguments = AdapterTrainingArguments(
        output_dir=str(run), trackio_static_space_id=False, show_progress=show_progress, **chosen
    )
    trainer = AdapterTrainer(str(base.folder), arguments, train_dataset=rows, base=base)
    if data_id is not None:
        trainer.data_name = data_id
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    done, wanted = trainer.state.global_step, trainer.state.max_steps
    if trainer.guard.stop_asked and done < wanted:
        raise RunStoppedError(
            f"The run was asked to stop: {done} of {wanted} steps are done and saved. The same call goes on from there."
        )
    adapter = trainer.save_adapter(run / "adapter")
    record = read_record(adapter)
    assert record is not None, "save_adapter writes the record"
    return TrainingOutcome(adapter, record)


def _reporters(wanted: str) -> list[str]:
    names = [name for name in wanted.split(",") if name != "none"]
    for name in names:
        if not any(find_spec(package) for package in REPORTERS[name]):
            raise ConfigurationError(
                f"report_to={name} needs a package that is not installed: pip install {REPORTERS[name][-1]}."
            )
    return names


def run_key(base: ResolvedBase, rows: Any, recipe: TrainingRecipe) -> str:
    """Twelve hex digits that name a run: the same base, rows and settings give the same run, anything else another."""
    settings = asdict(recipe)
    # Who is told of a run does not change what it does.
    del settings["report_to"]
    digest = hashlib.sha256(json.dumps([base.fingerprint, settings], sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:12]
