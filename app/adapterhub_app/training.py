"""What the Train and Runs tabs do, without the page: read a file, plan, start a run as a process of its own, keep its adapter.

Nothing here trains: a run is `adapterhub-lite train` in a process that outlives the page and the server, and its folder
says how far it is (see `adapterhub_lite.runs`).
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_app.backend import Backend
from adapterhub_app.bases import base_named, base_of_run, base_words
from adapterhub_lite.adapter_format.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    AdapterManifest,
    EvaluationRecord,
    name_problem,
    read_manifest,
)
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterHubError, ReferenceSyntaxError, UsageError
from adapterhub_lite.memory import MEMORY_PRESETS, Machine, MemoryPlan, plan_memory, refusal
from adapterhub_lite.runs.folder import Run, read_run
from adapterhub_lite.runs.starting import start
from adapterhub_lite.runs.state import RunState, note, now
from adapterhub_lite.tasks import TASKS
from adapterhub_lite.training.settings import TrainingRecipe

if TYPE_CHECKING:
    from adapterhub_lite.training.data.preview import RowsPreview
    from adapterhub_lite.training.data.usable import UsableRows

# Answers of a run's report are looked at by a person, and each is generated twice.
REPORT_ROWS, SAMPLE_ROWS = 8, 2
HELD_OUT = 0.1
EXAMPLES = 4
MOST_FILE_BYTES = 64 << 20
FILE_TYPES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where the rows of a run come from: a file that was given to the page, a data set on the Hub, or an example task.

    `prompt` and `completion` name columns, where their names do not say what they are.
    """

    file: str | None = None
    hub: str = ""
    task: str = ""
    prompt: str = ""
    completion: str = ""

    @property
    def is_named(self) -> bool:
        """Whether there is any source yet."""
        return bool(self.file or self.hub or self.task)

    @property
    def name(self) -> str:
        """What the rows are called."""
        return Path(self.file).name if self.file else self.hub or f"the example task {self.task}"


@dataclass(frozen=True)
class Look:
    """What a source gives: the rows that can be trained, and how they are learned on a base, token by token."""

    base: ResolvedBase
    source: Source
    rows: "UsableRows"
    preview: "RowsPreview | None"

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.preview.lengths, default=1) if self.preview else 1


def look_at(backend: Backend, source: Source, recipe: TrainingRecipe, base_name: str | None = None) -> Look:
    """Read a source and lay out its first rows as they will be learned on the base that was picked (None: the served one).

    Raises:
        DataError: it cannot be read.
        UsageError: there is no source, or no such base.
    """
    from adapterhub_lite.tasks import get_task
    from adapterhub_lite.training.data.lengths import tokenizer_of
    from adapterhub_lite.training.data.preparation import Preparation
    from adapterhub_lite.training.data.preview import preview_rows
    from adapterhub_lite.training.data.usable import usable_rows

    base = base_named(backend, base_name)
    pair = (source.prompt, source.completion) if source.prompt and source.completion else None
    if source.task:
        rows = usable_rows(get_task(source.task).rows(EXAMPLE_ROWS))
    elif source.file or source.hub:
        rows = usable_rows(source.file or source.hub, pair)
    else:
        raise UsageError("There are no rows yet. Drop a file, or name a data set.")
    if not rows.found:
        return Look(base, source, rows, None)
    tokenizer, ends = tokenizer_of(str(base.folder))
    preparation = Preparation.for_run(
        tokenizer, recipe, max_length=recipe.max_length, overlong=recipe.overlong, ends=ends
    )
    return Look(base, source, rows, preview_rows(rows.table(), preparation, template=f"that of {base.name}"))


EXAMPLE_ROWS = 320


def plan_of(backend: Backend, look: Look, recipe: TrainingRecipe) -> MemoryPlan:
    """What a run on these rows will need, and which preset it gets; raises as `plan_memory` does."""
    return plan_memory(
        look.base, batch_size=recipe.batch_size, sequence_length=max(8, look.longest), rank=recipe.rank,
        target_modules=recipe.target_modules, preset=recipe.memory_preset, home=backend.registry.home,
    )  # fmt: skip


def preset_choices() -> list[tuple[str, str]]:
    """The memory presets that give an adapter and that this machine can run, as (label, value); the plan's own first."""
    machine = Machine.present()
    found = [one for one in MEMORY_PRESETS.values() if one.trains == "lora" and refusal(one, machine) is None]
    return [("auto: the plan chooses", "auto"), *((f"{one.name}: {one.summary}", one.name) for one in found)]


def recipe_of(values: Mapping[str, Any]) -> TrainingRecipe:
    """The settings of a run from what stands in the page's fields.

    Raises:
        ConfigurationError: a value out of range; the text names all of them.
        UsageError: a field is empty.
    """
    missing = sorted(name for name, value in values.items() if value is None)
    if missing:
        raise UsageError(f"A number is missing: {', '.join(missing)}. Fill every field.")
    held_out = float(values.get("validation_split", HELD_OUT))
    asked: dict[str, Any] = {"samples": SAMPLE_ROWS, "report": REPORT_ROWS} if held_out else {}
    # A page's number without a fraction is whole; a rate of 1 and one of 1.0 would be two runs.
    kinds = {one.name: str(one.type) for one in fields(TrainingRecipe)}
    typed: dict[str, Any] = {name: float(value) if "float" in kinds[name] else value for name, value in values.items()}
    return TrainingRecipe(**{**typed, **asked})


def start_run(backend: Backend, user: str | None, name: str, look: Look, recipe: TrainingRecipe) -> Run:
    """Start a run on the rows that were looked at, or go on with it if it is the same run; returns it as it is then.

    Raises:
        UsageError: the person is not an admin, or the name is no adapter's name.
        DataError: no row can be trained.
        OutOfMemoryError, ConfigurationError: no preset fits, or not the one that was chosen; as `plan_of` says.
    """
    from adapterhub_lite.training.recipe import rows_for, run_folder

    backend.access.require_admin(user, "train")
    name = name.strip()
    if problem := name_problem(name):
        raise ReferenceSyntaxError(problem)
    base, home = look.base, backend.registry.home
    folder = home / "runs" / name
    plan_of(backend, look, recipe)
    where = rows_words(look, folder)
    rows, data_id = rows_for(*where, recipe)
    run = run_folder(base, rows, folder, recipe)
    words = ["--data", str(where[0])] if where[0] else ["--task", str(where[1])]
    command = ["train", name, *words, "--base", base_words(base), "--home", str(home), "--queue", "--no-add"]
    state = RunState(
        name=name, stage="waiting", created=now(), changed=now(), command=(*command, *options_of(recipe)),
        cwd=str(Path.cwd()), base=base.name, base_fingerprint=base.fingerprint, data=data_id,
        rows=len(rows), steps=max(0, recipe.steps),
    )  # fmt: skip
    before = read_run(run)
    if before is None or not (before.is_under_way or before.stage == "finished"):
        start(run, state)
    found = read_run(run)
    assert found is not None, "its state was just written"
    return found


def rows_words(look: Look, folder: Path) -> tuple[str | None, str | None]:
    """Where a process of its own finds the rows: a file in the run's home, or the name of an example task."""
    if look.source.task:
        return None, look.source.task
    look.rows.table()
    text = repr([row for _, row in look.rows.found]).encode()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(look.source.name).stem).strip("-.")[:60] or "rows"
    file = folder / f"{stem}-{hashlib.sha256(text).hexdigest()[:8]}.jsonl"
    return str(file if file.exists() else look.rows.write(file)), None


def options_of(recipe: TrainingRecipe) -> list[str]:
    """The options of `train` that give this recipe: those that differ from their defaults."""
    words: list[str] = []
    for one in fields(recipe):
        value, option = getattr(recipe, one.name), "--" + one.name.replace("_", "-")
        if value == one.default or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, str(value)]
    return words


def keep_adapter(
    backend: Backend, user: str | None, run: Run, name: str, description: str, examples: Sequence[str] = ()
) -> AdapterManifest:
    """Add what a run has trained so far to the registry, with what its report measured.

    Raises:
        UsageError: the person is not an admin, nothing is saved yet, or the run's base is gone.
        AdapterRejectedError: with every problem of the adapter.
    """
    backend.access.require_admin(user, "add an adapter")
    folder = run.adapter
    if folder is None:
        raise UsageError("Nothing of this run is saved yet, so there is nothing to add. Resume it first.")
    report = run.report() or {}
    scores = {name: report[name] for name in ("exact_match", "loss") if name in report}
    data = f"{run.state.data}, {report.get('held_out', 0)} held-out rows"[:200]
    measured = [
        EvaluationRecord(metric=metric, adapter_value=pair["adapter"], base_value=pair["base"], data=data)
        for metric, pair in scores.items()
    ]
    asked = [str(row["prompt"]) for row in report.get("rows", ())]
    example = next((one for one in TASKS.values() if one.data_id == run.state.data), None)
    manifest = backend.registry.add(
        folder, name.strip(), base=base_of_run(backend, run), evaluation=measured,
        task=description.strip() or (example.description if example else None),
        examples=[*examples, *asked][:EXAMPLES],
    )  # fmt: skip
    note(run.folder, reference=manifest.reference)
    return manifest


def name_in(files: Sequence[str]) -> str:
    """The name under which an adapter was kept where its files come from; "" where they do not say.

    A browser does not tell what the folder itself is called.
    """
    for file in files:
        if Path(file).name == MANIFEST_FILE:
            try:
                with Path(file).open("rb") as opened:
                    return read_manifest(opened.read(MAX_MANIFEST_BYTES + 1)).name
            except AdapterHubError:  # `add` will say what is wrong with it
                return ""
    return ""


def add_folder(backend: Backend, user: str | None, files: Sequence[str], name: str) -> AdapterManifest:
    """Add an adapter whose files were given to the page, each on its own; raises as the registry's `add` does."""
    import tempfile

    backend.access.require_admin(user, "add an adapter")
    if not files:
        raise UsageError("No file came with it. Choose the folder that holds adapter_config.json.")
    if problem := name_problem(name.strip()):
        raise ReferenceSyntaxError(problem)
    with tempfile.TemporaryDirectory() as aside:
        for file in files:
            shutil.copy(file, Path(aside) / Path(file).name)
        return backend.registry.add(aside, name.strip(), base=backend.base)
