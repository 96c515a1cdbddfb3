"""`merge`: adapters into one, or one into the base."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, say, short, waiting, would

if TYPE_CHECKING:
    from adapterhub_lite.merging.adapters import Method


def merge(
    references: Annotated[list[str], typer.Argument(help="The adapters: name, name:version, name@alias or a digest.")],
    weights: Annotated[str | None, typer.Option(help="One factor for each, comma-separated; 1 when not given.")] = None,
    method: Annotated[str, typer.Option(help="cat (exact), svd, ties, dare_ties or linear.")] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random methods.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the merged adapter.")] = "merged",
    into_base: Annotated[
        Path | None, typer.Option("--into-base", help="Write base + one adapter as a model folder there instead.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the adapters' base is; looked for when not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, for --into-base.")] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters into one, or one adapter into its base; the result carries its measured error.

    Example: `adapterhub-lite merge sql:3 event@prod --weights 0.7,0.3 --name both`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.merging import merge_adapters, merge_into_base
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    if dry_run:
        known = [registry.resolve(one).reference for one in references]
        shares = _numbers(weights) or [1.0] * len(known)
        if len(shares) != len(known):
            raise ConfigurationError(f"{len(known)} adapters and {len(shares)} weights: give one for each.")
        parts = " + ".join(f"{share:g} x {one}" for share, one in zip(shares, known, strict=True))
        way = f"into the base, as {into_base}" if into_base else f"by {_method(method)} into a new version of {name}"
        return would(f"merge {parts} {way}", as_json, references=known, weights=shares)
    resolved = resolve_base(base, home=home) if base else None
    if into_base is not None:
        if len(references) != 1:
            raise ConfigurationError(f"--into-base takes one adapter, got {len(references)}. Merge them first.")
        with waiting(f"merging {references[0]} into its base"):
            model = merge_into_base(references[0], into_base, dtype, registry=registry, base=resolved)
        if as_json:
            return print_json(asdict(model))
        error = f"relative error {model.relative_error:.2e}"
        return say(f"{model.folder}: base + {model.adapter} in {model.dtype}, {error}.")
    with waiting("merging"):
        merged = merge_adapters(
            references,
            _numbers(weights),
            _method(method),
            rank=rank,
            seed=seed,
            name=name,
            registry=registry,
            base=resolved,
        )
    if as_json:
        return print_json(
            {"manifest": merged.manifest.model_dump(mode="json"), "relative_error": merged.relative_error}
        )
    say(f"{merged.manifest.reference} ({short(merged.manifest.digest)}), relative error {merged.relative_error:.2e}.")


def _numbers(text: str | None) -> list[float] | None:
    from adapterhub_lite.errors import ConfigurationError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--weights is {text!r}, wanted numbers with commas, as 0.7,0.3.") from error


def _method(text: str) -> "Method":
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.merging.adapters import Method

    methods: tuple[Method, ...] = get_args(Method)
    for known in methods:
        if text == known:
            return known
    raise ConfigurationError(f"There is no merge method {text!r}. Known: {', '.join(methods)}.")
