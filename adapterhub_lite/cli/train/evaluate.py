"""`eval`: base beside adapter, by exact match, loss, functions of one's own, or whole benchmarks."""

from pathlib import Path
from typing import Annotated, Any

import typer

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


def evaluate(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    data: Annotated[str | None, typer.Option(help="A JSONL file or a data set's id on the Hub.")] = None,
    task: Annotated[str | None, typer.Option(help="An example task's held-out rows instead of data.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="exact_match, loss, perplexity, or a function of yours as module:function, called with (wanted, "
            "found) for each row; may be repeated. The first three when not given."
        ),
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness, if that is installed; may be repeated.")
    ] = None,
    harness_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own for it.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    limit: Annotated[int, typer.Option(min=1, help="So many rows at most.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Keep the result in the registry.")] = True,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure base and adapter on the same rows and keep the result, which `show` and `list --metric` then have.

    Example: `adapterhub-lite eval sql@prod --task sql --limit 100 --metric exact_match --metric scores:near`
    """
    from adapterhub_lite.evaluation import evaluation_rows, find_metric
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.resolve(reference)
    metrics = metric or ([] if harness and not (data or task) else ["exact_match", "loss", "perplexity"])
    for name in metrics:
        find_metric(name)
    rows = evaluation_rows(data, task, limit) if metrics else []
    if dry_run:
        named = ", ".join([*metrics, *(harness or [])])
        return would(f"measure {named} of {manifest.reference} and {base} on {len(rows)} rows", as_json, rows=len(rows))
    source = Path(data).name if data and Path(data).exists() else data or f"adapterhub-lite/tasks/{task}, held-out"
    measured = [(one, source) for one in _on_rows(registry, manifest, rows, metrics, base, home, max_new_tokens)]
    measured += [
        (one, f"lm-evaluation-harness, {limit} documents")
        for one in _on_harness(registry, manifest, harness or [], harness_folder, base, home, limit)
    ]
    if record:
        _keep(registry, manifest, measured)
    scores = {one.metric: {"base": one.base, "adapter": one.adapter} for one, _ in measured}
    if as_json:
        return print_json(
            {"reference": manifest.reference, "digest": manifest.digest, "rows": len(rows), "metrics": scores,
             "recorded": record}
        )  # fmt: skip
    lines = [(one.metric, f"{one.base:.3f}", f"{one.adapter:.3f}") for one, _ in measured]
    print_table(
        f"{len(rows)} rows of {source}" if rows else "Benchmarks", ("metric", "base", manifest.reference), lines
    )
    if record:
        say(f"Kept: `adapterhub-lite show {manifest.reference}` has it.")


def _on_rows(
    registry: Any, manifest: Any, rows: Any, metrics: list[str], base: str, home: str | None, max_new_tokens: int
) -> list[Any]:
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.evaluation import LOSSES, compare_answers, compare_losses
    from adapterhub_lite.serving import InferenceEngine

    answered, measured = [name for name in metrics if name not in LOSSES], list[Any]()
    if answered:
        with (
            waiting("asking base and adapter"),
            InferenceEngine.from_base(base, registry=registry, home=home) as engine,
        ):
            measured += compare_answers(engine, manifest.reference, rows, answered, max_new_tokens)
    if set(metrics) & set(LOSSES):
        with waiting("measuring the loss"):
            found = compare_losses(registry, manifest, resolve_base(base, home=home), rows)
        measured += [one for one in found if one.metric in metrics]
    return measured


def _on_harness(
    registry: Any, manifest: Any, tasks: list[str], folder: Path | None, base: str, home: str | None, limit: int
) -> list[Any]:
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.evaluation import compare_on_harness

    if not tasks:
        return []
    return compare_on_harness(registry, manifest, resolve_base(base, home=home), tasks, limit=limit, folder=folder)


def _keep(registry: Any, manifest: Any, measured: list[Any]) -> None:
    from adapterhub_lite.adapter_format.manifest import EvaluationRecord

    registry.record_evaluation(
        manifest.reference,
        [
            EvaluationRecord(metric=one.metric, adapter_value=one.adapter, base_value=one.base, data=source[:200])
            for one, source in measured
        ],
    )
