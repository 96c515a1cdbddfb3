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
from adapterhub_lite.cli.train.dry_run import rehearse
from adapterhub_lite.cli.train.interrupted import Interruptible
from adapterhub_lite.errors import ConfigurationError, ReferenceSyntaxError, UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.quiet import quiet_rendezvous
from adapterhub_lite.training.settings import TrainingRecipe

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
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter and add it to the registry. See how rows are read with `preview`.

    Example: `adapterhub-lite train sql --data questions.csv --validation-split 0.1 --steps 60`
    """
    with quiet_rendezvous(nodes):
        from adapterhub_lite.training.distributed.launch import Launch, is_first, launch, launched
    from adapterhub_lite.adapter_format.manifest import name_problem
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.training.recipe import rows_for, run_folder, train_adapter

    wanted, recipe = Launch(devices, nodes, rendezvous, patience), build_settings(TrainingRecipe, given, config)
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
        outcome = train_adapter(resolved, rows, folder, recipe, data_id=data_id, show_progress=is_first())
        if not is_first():
            return None
        run.finished = outcome.folder
        manifest = AdapterRegistry(home).add(
            outcome.folder, name, base=resolved, task=description or task, examples=example or (), answer_schema=kept
        )
    if as_json:
        return print_json(manifest.model_dump(mode="json"))
    say(described(manifest, outcome.record))


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
    loss = "" if record.final_loss is None else f", loss {record.final_loss:.4g}"
    return f"{manifest.reference} ({short(manifest.digest)}): {record.steps} steps{loss}, {record.wall_seconds:.0f} s."
