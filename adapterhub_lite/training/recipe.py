"""From a recipe to an adapter folder: one run, which goes on from its last checkpoint if it was interrupted."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from adapterhub_lite.adapter_format.manifest import TrainingRecord, read_record
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import ConfigurationError, RunStoppedError
from adapterhub_lite.runs.state import RunKeeper, RunState, keeping, note, now
from adapterhub_lite.tasks import get_task
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.held_out import row_digests, split_rows, without_rows_of
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.data.rows import columns_of, is_checked, load_rows
from adapterhub_lite.training.distributed.launch import is_first
from adapterhub_lite.training.report import write_report
from adapterhub_lite.training.run.progress import StateCallback
from adapterhub_lite.training.samples import SampleCallback
from adapterhub_lite.training.settings import REPORTERS, RowSettings, TrainingRecipe
from adapterhub_lite.training.trainer import AdapterTrainer

logger = logging.getLogger(__name__)
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
        name = Path(data).name if Path(data).exists() else data
        return read_rows(data, recipe), name
    # By epochs, a task is as long as its rows are drawn.
    count = TASK_ROWS if recipe.steps < 0 else recipe.steps * recipe.batch_size * recipe.accumulation
    example = get_task(str(task))
    return example.rows(min(count, MOST_TASK_ROWS), seed=recipe.seed), example.data_id


def read_rows(data: str, settings: RowSettings) -> Dataset:
    """The rows of a file, a folder or a data set on the Hub, as the settings say."""
    config = settings.data_config or None
    return load_rows(data, split=settings.data_split, config=config, columns=columns_of(settings))


def held_out_rows(rows: Any, recipe: TrainingRecipe) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those to evaluate on, None without; no text is among both. `rows` is as `load_rows` takes it."""
    if not (isinstance(rows, Dataset) and is_checked(rows)):
        rows = load_rows(rows, columns=columns_of(recipe))
    if recipe.validation_split:
        return split_rows(rows, recipe.validation_split, recipe.seed)
    if not recipe.eval_data:
        return rows, None
    held, shared = without_rows_of(read_rows(recipe.eval_data, recipe), rows)
    if shared:
        logger.warning(f"{shared} rows of {recipe.eval_data} are trained on too, and are left out of the evaluation.")
    return rows, held


def train_adapter(
    base: ResolvedBase,
    rows: Sequence[dict[str, Any]] | Any,
    folder: str | Path,
    recipe: TrainingRecipe,
    *,
    data_id: str | None = None,
    show_progress: bool = True,
    command: Sequence[str] = (),
) -> TrainingOutcome:
    """Train on `rows` (anything `load_rows` takes) and return the adapter, in a run folder of its own under `folder`.

    The same base, rows and settings are the same run: a finished one is returned as it is, an interrupted one goes on
    from its last checkpoint. How far it is stands in `run.json` there (see `adapterhub_lite.runs`); `command` are the
    words of the command line that go on with it.

    Raises:
        DataError: a row cannot be used.
        RunStoppedError: SIGTERM came before the last step.
        KeyboardInterrupt: by Ctrl-C, saved after one; by a second, at once.
        TrainingError: the run stopped because going on would be wrong.
        RegistryError: another process is at this run.
    """
    rows, held_out = held_out_rows(rows, recipe)
    run = Path(folder) / run_key(base, rows, recipe, held_out)
    finished = read_record(run / "adapter")
    if finished is not None:
        note(run, stage="finished")
        return TrainingOutcome(run / "adapter", finished)
    if not is_first():
        return _train(base, rows, held_out, run, recipe, None, data_id, show_progress)
    state = RunState(
        name=run.parent.name, stage="preparing", created=now(), changed=now(), command=tuple(command),
        cwd=str(Path.cwd()), base=base.name, base_fingerprint=base.fingerprint, data=data_id or "rows in memory",
        rows=len(rows), held_out=len(held_out) if held_out is not None else 0, settings=asdict(recipe),
    )  # fmt: skip
    with keeping(run, state) as keeper:
        return _train(base, rows, held_out, run, recipe, keeper, data_id, show_progress)


def _train(
    base: ResolvedBase,
    rows: Dataset,
    held_out: Dataset | None,
    run: Path,
    recipe: TrainingRecipe,
    keeper: RunKeeper | None,
    data_id: str | None,
    show_progress: bool,
) -> TrainingOutcome:
    trainer = trainer_for(base, rows, held_out, run, recipe, data_id=data_id, show_progress=show_progress)
    if keeper is not None:
        predicted = trainer.memory_choice.predicted
        keeper.update(preset=trainer.memory_choice.preset.name, predicted_bytes=predicted.total if predicted else None)
        trainer.add_callback(StateCallback(keeper))
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    done, wanted = trainer.state.global_step, trainer.state.max_steps
    if trainer.guard.stop_asked and done < wanted:
        raise RunStoppedError(
            f"The run was asked to stop: {done} of {wanted} steps are done and saved. The same call goes on from there."
        )
    if keeper is not None:
        keeper.update(stage="reporting")
    if held_out is not None:
        measured = trainer.evaluate()
        if recipe.report:
            write_report(trainer, held_out, recipe.report, run, loss=measured["eval_loss"])
    adapter = trainer.save_adapter(run / "adapter")
    record = read_record(adapter)
    assert record is not None, "save_adapter writes the record"
    if keeper is not None:
        keeper.update(stage="finished", data_fingerprint=record.data.fingerprint)
    return TrainingOutcome(adapter, record)


def trainer_for(
    base: ResolvedBase,
    rows: Dataset,
    held_out: Dataset | None,
    run: Path,
    recipe: TrainingRecipe,
    *,
    data_id: str | None = None,
    show_progress: bool = True,
) -> AdapterTrainer:
    """The trainer of one run in the folder `run`, as the recipe says."""
    chosen = {**recipe.arguments(), "report_to": _reporters(recipe.report_to)}
    callbacks: list[TrainerCallback] = []
    if held_out is not None:
        chosen |= {"eval_strategy": "steps", "eval_steps": recipe.save_steps}
    if recipe.early_stopping:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        chosen |= {**best, "restore_callback_states_from_checkpoint": True}
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping))
    # A run publishes nothing that was not asked for: the default makes a Space of the run's figures at its end.
    arguments = AdapterTrainingArguments(
        output_dir=str(run), trackio_static_space_id=False, show_progress=show_progress, **chosen
    )
    trainer = AdapterTrainer(
        str(base.folder),
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        base=base,
        data_settings=recipe,
        callbacks=callbacks,
    )
    if recipe.samples and held_out is not None:
        say = trainer.progress.say if trainer.progress else logger.info
        trainer.add_callback(SampleCallback(trainer, held_out.select(range(min(recipe.samples, len(held_out)))), say))
    if data_id is not None:
        trainer.data_name = data_id
    return trainer


def run_folder(base: ResolvedBase, rows: Any, folder: str | Path, recipe: TrainingRecipe) -> Path:
    """Where `train_adapter` puts the run with these arguments."""
    rows, held_out = held_out_rows(rows, recipe)
    return Path(folder) / run_key(base, rows, recipe, held_out)


def _reporters(wanted: str) -> list[str]:
    names = [name for name in wanted.split(",") if name != "none"]
    for name in names:
        if not any(find_spec(package) for package in REPORTERS[name]):
            raise ConfigurationError(
                f"report_to={name} needs a package that is not installed: pip install {REPORTERS[name][-1]}."
            )
    return names


def run_key(base: ResolvedBase, rows: Dataset, recipe: TrainingRecipe, held_out: Dataset | None = None) -> str:
    """Twelve hex digits that name a run: the same base, rows and settings give the same run, anything else another."""
    settings = asdict(recipe)
    # Who is told of a run, and what it is asked on the way, does not change what it does.
    del settings["report_to"], settings["samples"], settings["report"]
    digest = hashlib.sha256(json.dumps([base.fingerprint, settings], sort_keys=True).encode())
    digest.update((recipe.chat_template_text() or "").encode())
    for table in (rows, held_out):
        for row in row_digests(table) if table is not None else ():
            digest.update(row)
    return digest.hexdigest()[:12]
