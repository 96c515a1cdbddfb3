"""`train`: rows in, an adapter version in the registry out."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.adapter_format.manifest import AdapterManifest, TrainingRecord
from adapterhub_lite.cli.answer_schema import read_answer_schema
from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import (
    DescriptionOption,
    DryRunOption,
    ExampleOption,
    HomeOption,
    JsonOption,
    SchemaOption,
    print_json,
    say,
    short,
)
from adapterhub_lite.cli.train.after import next_steps, show_report
from adapterhub_lite.cli.train.dry_run import rehearse
from adapterhub_lite.cli.train.interrupted import Interruptible
from adapterhub_lite.errors import ConfigurationError, ReferenceSyntaxError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.quiet import quiet_rendezvous
from adapterhub_lite.runs.starting import attended
from adapterhub_lite.runs.state import note
from adapterhub_lite.tasks import get_task
from adapterhub_lite.training.settings import TrainingRecipe

# Questions of an example task that its card shows.
EXAMPLES = 4
STRATEGIES = ("auto", "ddp", "zero1", "zero2", "zero3", "fsdp")


@options_from(TrainingRecipe)
def train(
    name: Annotated[str, typer.Argument(help="The adapter's name; a new version is added each time.")],
    given: dict[str, Any],
    data: Annotated[
        str | None, typer.Option(help="A JSONL, JSON, CSV or parquet file, a folder, or a data set's id on the Hub.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="An example task instead of data: sql or event.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    devices: Annotated[
        int, typer.Option(help="Processes on this machine, one per GPU (or, without one, on the CPU).")
    ] = 1,
    strategy: Annotated[str, typer.Option(help=f"How they share the work: {', '.join(STRATEGIES)}.")] = "auto",
    nodes: Annotated[int, typer.Option(help="Machines; the same command is run on each.")] = 1,
    rendezvous: Annotated[str, typer.Option(help="HOST:PORT of one of them, where all meet.")] = "",
    patience: Annotated[int, typer.Option(help="Seconds to wait for the other machines.")] = 300,
    description: DescriptionOption = None,
    example: ExampleOption = None,
    schema: SchemaOption = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings; options given here win.")] = None,
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add the adapter to the registry at the end.")] = True,
    queue: Annotated[
        bool, typer.Option("--queue", help="Wait until no other run that waits like this trains.")
    ] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter and add it to the registry. See how rows are read with `preview`.

    Example: `adapterhub-lite train sql --data questions.csv --validation-split 0.1 --steps 60`
    """
    with attended(home, queue=queue and not dry_run):
        train_and_add(
            name, given, data=data, task=task, base=base, launch_settings=(devices, nodes, rendezvous, patience),
            strategy=strategy, description=description, example=example, schema=schema, config=config, add=add,
            dry_run=dry_run, home=home, as_json=as_json,
        )  # fmt: skip


def train_and_add(
    name: str,
    given: dict[str, Any],
    *,
    data: str | None,
    task: str | None,
    base: str,
    launch_settings: tuple[int, int, str, int],
    strategy: str,
    description: str | None,
    example: list[str] | None,
    schema: Path | None,
    config: Path | None,
    add: bool,
    dry_run: bool,
    home: str | None,
    as_json: bool,
) -> None:
    """What `train` does once it is its turn; `launch_settings` are devices, nodes, rendezvous and patience."""
    with quiet_rendezvous(launch_settings[1]):
        from adapterhub_lite.training.distributed.launch import Launch, is_first, launch, launched
    from adapterhub_lite.adapter_format.manifest import name_problem
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.training.recipe import rows_for, run_folder, train_adapter

    wanted, recipe = Launch(*launch_settings), build_settings(TrainingRecipe, given, config)
    recipe = split_by(strategy, recipe)
    if problem := name_problem(name):
        raise ReferenceSyntaxError(problem)
    kept = read_answer_schema(schema)
    with Interruptible(name, base, home) as run:
        rows, data_id = rows_for(data, task, recipe)
        if dry_run:
            shown = rows if data else None
            return rehearse(name, recipe, len(rows), data_id, shown, base, home, as_json, wanted.processes)
        resolved = resolve_base(base, home=home, progress=say)
        folder = adapterhub_home(home) / "runs" / name
        run.folder = partial(run_folder, resolved, rows, folder, recipe)
        if wanted.processes > 1 and not launched():
            return launch(wanted, ["-m", "adapterhub_lite", *sys.argv[1:]])
        outcome = train_adapter(
            resolved, rows, folder, recipe, data_id=data_id, show_progress=is_first(), command=sys.argv[1:]
        )
        if not is_first():
            return None
        run.finished = outcome.folder
        if not add:
            facts = {"folder": str(outcome.folder), "record": outcome.record.model_dump(mode="json")}
            return print_json(facts) if as_json else say(trained(outcome.folder, outcome.record))
        about, examples = card_words(task, description, example)
        manifest = AdapterRegistry(home).add(
            outcome.folder, name, base=resolved, task=about, examples=examples, answer_schema=kept
        )
        note(outcome.folder.parent, reference=manifest.reference)
    if as_json:
        return print_json(manifest.model_dump(mode="json"))
    show_report(outcome.folder.parent)
    say(described(manifest, outcome.record))
    say(next_steps(manifest, data, task, base))


def card_words(task: str | None, description: str | None, example: list[str] | None) -> tuple[str | None, list[str]]:
    """Description and examples of a version: what was given, and for an example task what is known of it."""
    known = get_task(task) if task else None
    about = description or (known.description if known else None)
    return about, example or (known.questions(EXAMPLES) if known else [])


def split_by(strategy: str, recipe: TrainingRecipe) -> TrainingRecipe:
    """The settings of a run whose devices share the work by `strategy`.

    Raises:
        UnknownNameError: there is no such strategy.
        ConfigurationError: a memory preset was chosen that does it otherwise.
    """
    if strategy not in STRATEGIES:
        raise UnknownNameError.among("strategy", strategy, list(STRATEGIES))
    if strategy == "auto":
        return recipe
    if recipe.memory_preset not in ("auto", strategy):
        raise ConfigurationError(f"--strategy {strategy} contradicts memory_preset {recipe.memory_preset}.")
    return replace(recipe, memory_preset=strategy)


def described(manifest: AdapterManifest, record: TrainingRecord) -> str:
    """What came of a run, in one line."""
    return f"{manifest.reference} ({short(manifest.digest)}): {figures(record)}."


def trained(folder: Path, record: TrainingRecord) -> str:
    """What came of a run that adds nothing to the registry."""
    return f"The adapter is in {folder}: {figures(record)}."


def figures(record: TrainingRecord) -> str:
    """Steps, loss and seconds of a run."""
    loss = "" if record.final_loss is None else f", loss {record.final_loss:.4g}"
    return f"{record.steps} steps{loss}, {record.wall_seconds:.0f} s"
