"""`merge`: several adapters into one, or one into its base."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, say, short, waiting, would


def merge(
    references: Annotated[list[str], typer.Argument(help="The adapters: name, name:version, name@alias or a digest.")],
    weights: Annotated[
        str | None, typer.Option(help="One factor per adapter, comma-separated; 1 if not given.")
    ] = None,
    method: Annotated[str, typer.Option(help="cat (exact), svd, ties, dare_ties or linear.")] = "cat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random methods.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the merged adapter.")] = "merged",
    into_base: Annotated[
        Path | None,
        typer.Option("--into-base", help="Write base + one adapter as a model folder to this path instead."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the adapters' base is; searched for if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, for --into-base.")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Let the model have a head of its own, for --into-base, where it must.")
    ] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters into one, or one adapter into its base; the result records its measured error.

    Example: `adapterhub-lite merge sql:3 event@prod --weights 0.7,0.3 --name both`
    """
    from adapterhub_lite.adapter_format.manifest import MergeMethod
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.merging import merge_adapters
    from adapterhub_lite.registry import AdapterRegistry

    methods: tuple[MergeMethod, ...] = get_args(MergeMethod)
    chosen = next((known for known in methods if known == method), None)
    if chosen is None:
        raise ConfigurationError(f"There is no merge method {method!r}. Known: {', '.join(methods)}.")
    factors = parse_weights(weights)
    registry = AdapterRegistry(home)
    if dry_run:
        known = [registry.resolve(one).reference for one in references]
        shares = factors or [1.0] * len(known)
        if len(shares) != len(known):
            raise ConfigurationError(f"{len(known)} adapters and {len(shares)} weights: give one weight per adapter.")
        parts = " + ".join(f"{share:g} x {one}" for share, one in zip(shares, known, strict=True))
        way = f"into the base, as {into_base}" if into_base else f"by {method} into a new version of {name}"
        return would(f"merge {parts} {way}", as_json, references=known, weights=shares)
    if into_base is not None:
        return merge_one(references, into_base, base, dtype, home, as_json, untie=untie)
    resolved = resolve_base(base, home=home) if base else None
    with waiting("merging"):
        merged = merge_adapters(
            references, factors, chosen, rank=rank, seed=seed, name=name, registry=registry, base=resolved
        )
    if as_json:
        return print_json(
            {"manifest": merged.manifest.model_dump(mode="json"), "relative_error": merged.relative_error}
        )
    say(f"{merged.manifest.reference} ({short(merged.manifest.digest)}), relative error {merged.relative_error:.2e}.")


def parse_weights(text: str | None) -> list[float] | None:
    """Read comma-separated factors; None stays None.

    Raises:
        ConfigurationError: they are not numbers.
    """
    from adapterhub_lite.errors import ConfigurationError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"--weights is {text!r}; expected numbers with commas, as 0.7,0.3.") from error


def merge_one(
    references: list[str],
    folder: Path,
    base: str | None,
    dtype: str | None,
    home: str | None,
    as_json: bool,
    *,
    untie: bool = False,
) -> None:
    """`merge --into-base`: write the base with one adapter merged into it as a model folder.

    Raises:
        ConfigurationError: there is more than one adapter.
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.merging import merge_into_base
    from adapterhub_lite.registry import AdapterRegistry

    if len(references) != 1:
        raise ConfigurationError(f"--into-base takes one adapter, got {len(references)}. Merge them first.")
    resolved = resolve_base(base, home=home) if base else None
    with waiting(f"merging {references[0]} into its base"):
        model = merge_into_base(
            references[0], folder, dtype, registry=AdapterRegistry(home), base=resolved, untie=untie
        )
    if as_json:
        return print_json(asdict(model))
    say(f"{model.folder}: base + {model.adapter} in {model.dtype}, relative error {model.relative_error:.2e}.")
