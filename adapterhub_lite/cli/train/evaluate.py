"""`eval`: base and adapter compared by exact match, loss, the user's own functions, or whole benchmarks."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import (
    DryRunOption,
    HomeOption,
    JsonOption,
    print_json,
    print_table,
    say,
    waiting,
    would,
)
from adapterhub_lite.cli.train.after import show_failures
from adapterhub_lite.training.settings import RowSettings

METRIC = (
    "exact_match, valid_json, loss, perplexity, or your own function as module:function, called with (expected, answer) for each row; "
    "may be repeated. If not given: exact_match, loss and perplexity."
)
HARNESS = "A task of lm-evaluation-harness, if that is installed; may be repeated."
DATA = "A JSONL, JSON, CSV or parquet file, a folder, or a data set's id on the Hub."


@options_from(RowSettings)
def evaluate(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    given: dict[str, Any],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    task: Annotated[str | None, typer.Option(help="The held-out rows of an example task instead of data.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help=METRIC)] = None,
    harness: Annotated[list[str] | None, typer.Option(help=HARNESS)] = None,
    harness_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own for it.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum answer length, in tokens.")] = 128,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Record the result in the registry.")] = True,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure base and adapter on the same rows and record the result for `show` and `list --metric`.

    Example: `adapterhub-lite eval sql@prod --task sql --limit 100 --metric exact_match --metric scores:near`
    """
    from adapterhub_lite import evaluation
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.resolve(reference)
    metrics = metric or ([] if harness and not (data or task) else ["exact_match", "loss", "perplexity"])
    for name in metrics:
        evaluation.find_metric(name)
    settings = build_settings(RowSettings, given, None)
    rows = evaluation.evaluation_rows(data, task, limit, settings) if metrics else []
    if dry_run:
        act = f"measure {', '.join([*metrics, *(harness or [])])} of {manifest.reference} and {base}"
        return would(f"{act} on {len(rows)} rows", as_json, rows=len(rows))
    source = Path(data).name if data and Path(data).exists() else data or f"adapterhub-lite/tasks/{task}, held-out"
    answered: list[evaluation.AnsweredRow] = []
    with waiting("loading the base") as tell:
        found = evaluation.measure(
            registry, manifest, base, rows, metrics, max_new_tokens=max_new_tokens, home=home, settings=settings,
            answered_rows=answered, tell=lambda done: tell(f"{done} of {2 * len(rows)} answers, of base and adapter"),
        )  # fmt: skip
    measured = [(one, source) for one in found]
    if harness:
        resolved = resolve_base(base, home=home)
        found = evaluation.compare_on_harness(registry, manifest, resolved, harness, limit=limit, folder=harness_folder)
        measured += [(one, f"lm-evaluation-harness, {limit} documents") for one in found]
    if record:
        evaluation.record_comparisons(registry, manifest, measured)
    if as_json:
        scores = {one.metric: {"base": one.base, "adapter": one.adapter} for one, _ in measured}
        facts = {"digest": manifest.digest, "rows": len(rows), "metrics": scores, "recorded": record}
        return print_json({"reference": manifest.reference, **facts})
    lines = [(one.metric, f"{one.base:.3f}", f"{one.adapter:.3f}") for one, _ in measured]
    print_table(
        f"{len(rows)} rows of {source}" if rows else "Benchmarks", ("metric", "base", manifest.reference), lines
    )
    show_failures([asdict(row) for row in answered if row.adapter.strip() != row.wanted.strip()])
    if record:
        say(f"Recorded: see `adapterhub-lite show {manifest.reference}`.")
