"""`sweep`: trials over ranges of settings on one resident base; the best adapter goes into the registry."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, short
from adapterhub_lite.cli.train.dry_run import rehearse
from adapterhub_lite.errors import ReferenceSyntaxError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.training.settings import TrainingRecipe


@options_from(TrainingRecipe)
def sweep(
    name: Annotated[str, typer.Argument(help="The adapter's name; the best trial becomes a new version of it.")],
    given: dict[str, Any],
    ranges: Annotated[
        Path, typer.Option(help="A YAML file: `rank: [4, 8]`, `learning_rate: {low: 1e-4, high: 1e-2, log: true}`.")
    ],
    trials: Annotated[int, typer.Option(help="How many trials.")] = 10,
    data: Annotated[
        str | None, typer.Option(help="A JSONL, JSON, CSV or parquet file, a folder, or a data set's id on the Hub.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="An example task instead of data: sql or event.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings; options given here win.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search settings: each trial is a clean adapter on the same base in memory, judged by its loss on held-out rows.

    The same command goes on with a sweep that was interrupted.

    Example: `adapterhub-lite sweep sql --task sql --validation-split 0.1 --steps 30 --ranges ranges.yaml --trials 8`
    """
    from adapterhub_lite.adapter_format.manifest import is_name
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.training.recipe import rows_for
    from adapterhub_lite.training.sweep import checked, read_ranges
    from adapterhub_lite.training.sweep import sweep as run_sweep

    recipe = build_settings(TrainingRecipe, given, config)
    if not is_name(name):
        raise ReferenceSyntaxError(
            f"{name!r} cannot name an adapter: wanted letters, digits, '.', '_', '-', 64 at most."
        )
    chosen = read_ranges(ranges)
    rows, data_id = rows_for(data, task, recipe)
    if dry_run:
        learned, held_out = checked(rows, recipe, chosen, trials)
        shown_ranges = "; ".join(f"{key} {one.described()}" for key, one in chosen.items())
        first = f"compare {trials} trials ({shown_ranges}) on {len(held_out)} held-out rows, and for the largest "
        largest = replace(recipe, rank=chosen["rank"].largest) if "rank" in chosen else recipe
        return rehearse(
            name, largest, len(learned), data_id, learned if data else None, base, home, as_json, 1, first=first
        )
    resolved = resolve_base(base, home=home, progress=say)
    found = run_sweep(resolved, rows, adapterhub_home(home) / "runs" / name, recipe, chosen, trials, data_id=data_id)
    manifest = AdapterRegistry(home).add(found.best.folder, name, base=resolved)
    if as_json:
        return print_json({"best": manifest.model_dump(mode="json"), "trials": found.trials})
    print_trials(name, found.trials)
    say(f"{manifest.reference} ({short(manifest.digest)}) is the best of {len(found.trials)} trials.")


def print_trials(name: str, trials: list[dict[str, Any]]) -> None:
    """The table of all trials, best first."""
    keys = sorted({key for one in trials for key in one["settings"]})
    print_table(
        f"Trials of {name}, best first",
        ["trial", "loss", *keys, "steps", "seconds"],
        [
            [
                one["trial"],
                f"{one['objective']:.4g}",
                *(shown(one["settings"].get(key)) for key in keys),
                one["steps"],
                one["seconds"],
            ]
            for one in sorted(trials, key=lambda one: float(one["objective"]))
        ],
    )


def shown(value: Any) -> str:
    """A setting's value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
