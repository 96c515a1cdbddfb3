"""`list`, `show` and `diff`: what the registry contains, and how two versions differ."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, megabytes, print_json, print_table, say, short

if TYPE_CHECKING:
    from adapterhub_lite.registry.operations.list import AdapterDetails


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
        say("No version matches." if chosen else "No adapters yet: `adapterhub-lite train NAME --data rows.jsonl`.")
    print_table("Adapters", ("reference", "aliases", "base", "size", "evaluation", "digest"), rows)


def show(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what one adapter is, where it came from and what holds it here; `--json` has the whole manifest.

    Example: `adapterhub-lite show sql@prod --json`
    """
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


def sentences(details: "AdapterDetails") -> list[str]:
    """What a version is, in plain sentences: base, LoRA, training, where it came from, and what holds it here."""
    manifest = details.manifest
    lora, base, record, origin = manifest.lora, manifest.base, manifest.training, manifest.origin
    said = [
        f"{manifest.reference} is a LoRA adapter for {base.id}" + (f", for {manifest.task}." if manifest.task else ".")
    ]
    kinds = [word for on, word in ((lora.use_dora, "DoRA"), (lora.use_rslora, "rsLoRA")) if on]
    said.append(
        f"It changes {lora.modules_bound} of {lora.modules_total} modules with rank {lora.rank} and alpha {lora.alpha:g}, "
        f"scaled by {lora.scaling:g}" + (f" ({', '.join(kinds)})." if kinds else ".")
    )
    at = f"commit {base.revision}, " if base.revision else ""
    loaded = f", loaded as {base.quantization}" if base.quantization else ""
    said.append(f"The base is known by {at}fingerprint {short(base.fingerprint)}{loaded}.")
    if base.named:
        said.append(f"Its own configuration calls the base {base.named!r}.")
    if record is not None:
        chats = record.text.of_chats if record.text else None
        asked = {True: "; ask it with chat messages", False: "; ask it with a raw prompt", None: ""}[chats]
        loss = "" if record.final_loss is None else f" to a loss of {shown_number(record.final_loss)}"
        said.append(
            f"It was trained for {record.steps} steps{loss} on {record.data.rows} rows of "
            f"{record.data.id}, in {record.wall_seconds:.0f} s{asked}."
        )
    if manifest.parents:
        parents = ", ".join(f"{one.reference} (weight {one.weight:g})" for one in manifest.parents)
        said.append(f"It was merged from {parents}.")
    if origin is not None and origin.repo_id:
        called = f", where it is called {origin.name}:{origin.version}" if origin.name else ""
        said.append(f"It came from {origin.repo_id}{called}.")
    held = [f"{manifest.name}@{alias}" for alias in details.aliases]
    held += [text for on, text in ((details.pinned, "a pin"), (details.held, "a running server")) if on]
    kept = (
        f"{', '.join(held)} {'keep' if len(held) > 1 else 'keeps'} it from gc"
        if held
        else "No alias, pin or server keeps it from gc"
    )
    said.append(f"{kept}. It was added {manifest.created}, takes {megabytes(details.size)} and is "
                f"{'' if details.signed else 'not '}signed. Digest {manifest.digest}.")  # fmt: skip
    return said


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


def shown_number(value: float | None) -> str:
    """A measured value with four significant digits."""
    return "not measured" if value is None else f"{value:.4g}"
