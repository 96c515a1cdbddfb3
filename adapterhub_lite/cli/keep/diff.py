"""`diff`: how two versions differ, down to each module."""

from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say


def diff(
    one: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    other: Annotated[str, typer.Argument(help="What to compare it with.")],
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also compare the changes to each module; loads torch.")
    ] = True,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: configuration, data, metrics, and the subspaces of their changes, module by module.

    Similarities go from 0 (nothing in common) to 1 (the same directions). Example: `adapterhub-lite diff sql:2 sql:3`
    """
    from adapterhub_lite.registry import AdapterRegistry

    found = AdapterRegistry(home).diff(one, other, layers=layers)
    if as_json:
        return print_json(asdict(found))
    columns = (found.one, found.other)
    if not found.same_base:
        say("They are for different bases.")
    if found.fields:
        print_table("What differs", ("key", *columns), [(key, *pair) for key, pair in found.fields.items()])
    else:
        say("Their records say the same.")
    if found.metrics:
        print_table("Metrics", ("metric", *columns), [(key, *map(_shown, p)) for key, p in found.metrics.items()])
    if found.layers:
        rows = [
            (layer.module, *(f"{value:.3f}" for value in (layer.input_similarity, layer.output_similarity,
                                                          layer.cosine, layer.norm, layer.other_norm)))
            for layer in found.layers
        ]  # fmt: skip
        heads = ("module", "reads alike", "writes alike", "cosine", f"norm of {found.one}", f"norm of {found.other}")
        print_table("Changes to each module", heads, rows)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
