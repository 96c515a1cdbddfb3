"""`train`: rows in, an adapter version in the registry out."""

from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, say, short
from adapterhub_lite.cli.rehearsal import rehearse
from adapterhub_lite.errors import ReferenceSyntaxError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.recipe import TrainingRecipe


@options_from(TrainingRecipe)
def train(
    name: Annotated[str, typer.Argument(help="The adapter's name; a new version is added each time.")],
    given: dict[str, Any],
    data: Annotated[str | None, typer.Option(help="A JSONL file or a data set's id on the Hub.")] = None,
    task: Annotated[str | None, typer.Option(help="An example task instead of data: sql or event.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings; options given here win.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a LoRA adapter and add it to the registry. Rows are `messages`, `prompt`/`completion` or `text`.

    Example: `adapterhub-lite train sql --data questions.jsonl --steps 60`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.reference import is_name
    from adapterhub_lite.training.recipe import rows_for, train_adapter

    recipe = build_settings(TrainingRecipe, given, config)
    if not is_name(name):
        raise ReferenceSyntaxError(
            f"{name!r} cannot name an adapter: wanted letters, digits, '.', '_', '-', 64 at most."
        )
    rows, data_id = rows_for(data, task, recipe)
    if dry_run:
        return rehearse(name, recipe, len(rows), data_id, data, base, home, as_json)
    resolved = resolve_base(base, home=home, progress=say)
    folder = adapterhub_home(home) / "runs" / name
    outcome = train_adapter(resolved, rows, folder, recipe, data_id=data_id)
    manifest = AdapterRegistry(home).add(outcome.folder, name, base=resolved)
    if as_json:
        return print_json(manifest.model_dump(mode="json"))
    say(
        f"{manifest.reference} ({short(manifest.digest)}): {outcome.record.steps} steps, "
        f"loss {outcome.record.final_loss}, {outcome.record.wall_seconds:.0f} s."
    )
