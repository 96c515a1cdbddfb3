"""`eval`: exact match of generated text, base beside adapter."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table


def evaluate(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    data: Annotated[str | None, typer.Option(help="A JSONL file or a data set's id on the Hub.")] = None,
    task: Annotated[str | None, typer.Option(help="An example task's held-out rows instead of data.")] = None,
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    limit: Annotated[int, typer.Option(help="So many rows at most.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer every row with the base and with the adapter, and count the answers that match exactly.

    Example: `adapterhub-lite eval sql@prod --task sql --limit 100`
    """
    from adapterhub_lite.evaluation import compare_with_base, evaluation_rows
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving import InferenceEngine

    registry = AdapterRegistry(home)
    manifest = registry.resolve(reference)
    rows = evaluation_rows(data, task, limit)
    with InferenceEngine.from_base(base, registry=registry, home=home) as engine:
        scores = compare_with_base(engine, manifest.reference, rows, max_new_tokens)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, "rows": len(rows), **scores})
    print_table(
        f"Exact match on {len(rows)} rows",
        ("model", "exact match"),
        [("base", f"{scores['base_exact_match']:.3f}"), (manifest.reference, f"{scores['adapter_exact_match']:.3f}")],
    )
