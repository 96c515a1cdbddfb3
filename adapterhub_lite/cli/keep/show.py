"""`list`, `show` and `diff`: what the registry contains, and how two versions differ."""

from dataclasses import asdict
from typing import Annotated

import typer

from adapterhub_lite.cli.output import (
    HomeOption,
    JsonOption,
    megabytes,
    print_json,
    print_table,
    say,
    short,
    shown_number,
)


def list_adapters(
    name: Annotated[str | None, typer.Argument(help="Only versions of this adapter.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Only for this base: its id, or the beginning of its fingerprint.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only for this task.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Only with this measured metric, or in a range: exact_match or exact_match>=0.8.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List adapter versions with their base, their size and what they scored.

    Example: `adapterhub-lite list --base HuggingFaceTB/SmolLM2-135M-Instruct --metric "exact_match>=0.8"`
    """
    from adapterhub_lite.registry import AdapterRegistry

    found = AdapterRegistry(home).summaries(name, base=base, task=task, metric=metric, tag=tag)
    if as_json:
        return print_json([{"reference": f"{one.name}:{one.version}", **one._asdict()} for one in found])
    rows = [
        (
            f"{one.name}:{one.version}",
            ", ".join((*one.aliases, *(["pinned"] if one.pinned else []))) or "-",
            one.base_id.rpartition("/")[2],
            megabytes(one.size),
            "; ".join(f"{metric} {value:.2f}" for metric, (value, _) in one.metrics.items()) or "-",
            short(one.digest),
        )
        for one in found
    ]
    if not found:
        chosen = any((name, base, task, metric, tag))
        return say(
            "No version matches."
            if chosen
            else "No adapters yet. Begin with `adapterhub-lite train sql --task sql`, an example task, or with your own: "
            "`adapterhub-lite train NAME --data rows.jsonl`, `add FOLDER NAME`, `pull ORG/REPOSITORY`."
        )
    print_table("Adapters", ("reference", "aliases", "base", "size", "evaluation", "digest"), rows)


def show(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what one adapter is, where it came from and what holds it here; `--json` has the whole manifest.

    Example: `adapterhub-lite show sql@prod --json`
    """
    from adapterhub_lite.cli.keep.sentences import sentences
    from adapterhub_lite.registry import AdapterRegistry

    details = AdapterRegistry(home).show(reference)
    manifest = details.manifest
    payload = manifest.model_dump(mode="json")
    measured = [one.model_dump() for one in details.evaluation]
    here = {key: value for key, value in details._asdict().items() if key not in ("manifest", "evaluation")}
    if as_json:
        return print_json({**payload, "here": {**here, "evaluation": measured}})
    typer.echo("\n".join(sentences(details)))
    if measured:
        scores = [
            (one.metric, one.data, shown_number(one.base_value), shown_number(one.adapter_value))
            for one in details.evaluation
        ]
        print_table("Evaluation", ("metric", "data", "base", "adapter"), scores)
    print_table(
        "Files", ("name", "size", "sha256"), [(n, megabytes(f.size), f.sha256) for n, f in manifest.files.items()]
    )


def diff(
    one: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    other: Annotated[str, typer.Argument(help="What to compare it with.")],
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also compare the weight changes of each module; loads torch.")
    ] = True,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: configuration, data, metrics, and the subspaces of their weight changes, module by module.

    Similarities range from 0 (nothing in common) to 1 (the same directions). Example: `adapterhub-lite diff sql:2 sql:3`
    """
    from adapterhub_lite.registry import AdapterRegistry

    found = AdapterRegistry(home).diff(one, other, layers=layers)
    if as_json:
        return print_json(asdict(found))
    columns = (found.one, found.other)
    if not found.same_base:
        say("They were trained for different bases.")
    if found.fields:
        print_table("What differs", ("key", *columns), [(key, *pair) for key, pair in found.fields.items()])
    else:
        say("Their records are identical.")
    if found.metrics:
        print_table("Metrics", ("metric", *columns), [(key, *map(shown_number, p)) for key, p in found.metrics.items()])
    if found.layers:
        rows = [
            (layer.module, *(f"{value:.3f}" for value in (layer.input_similarity, layer.output_similarity,
                                                          layer.cosine, layer.norm, layer.other_norm)))
            for layer in found.layers
        ]  # fmt: skip
        heads = (
            "module",
            "input similarity",
            "output similarity",
            "cosine",
            f"norm of {found.one}",
            f"norm of {found.other}",
        )
        print_table("Weight changes by module", heads, rows)
