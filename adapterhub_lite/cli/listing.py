"""`list` and `show`: what the registry holds."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, short


def list_adapters(
    name: Annotated[str | None, typer.Argument(help="Only versions of this adapter.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every adapter version with its base, its size and what it scored.

    Example: `adapterhub-lite list sql`
    """
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifests = registry.list(name=name)
    if as_json:
        return print_json([manifest.model_dump(mode="json") for manifest in manifests])
    aliases = {each: registry.aliases(each) for each in {manifest.name for manifest in manifests}}
    rows = [
        (
            f"{m.name}:{m.version}",
            ", ".join(alias for alias, version in aliases[m.name].items() if version == m.version) or "-",
            m.base.id,
            f"r={m.lora.rank}",
            f"{sum(file.size for file in m.files.values()) / 1e6:.1f} MB",
            "; ".join(f"{e.metric} {e.adapter_value:.2f}" for e in m.evaluation) or "-",
            short(m.digest),
        )
        for m in manifests
    ]
    print_table("Adapters", ("reference", "aliases", "base", "rank", "size", "evaluation", "digest"), rows)


def show(
    reference: Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one adapter's manifest: base, LoRA, training record, evaluation, files.

    Example: `adapterhub-lite show sql@prod --json`
    """
    from adapterhub_lite.registry import AdapterRegistry

    manifest = AdapterRegistry(home).resolve(reference)
    payload = manifest.model_dump(mode="json")
    if as_json:
        return print_json(payload)
    rows = [(key, value) for key, value in payload.items() if key not in ("files", "training")]
    print_table(f"{manifest.name}:{manifest.version}", ("key", "value"), rows)
    print_table("Files", ("name", "bytes", "sha256"), [(name, f.size, f.sha256) for name, f in manifest.files.items()])
    if payload.get("training"):
        print_table("Training", ("key", "value"), list(payload["training"].items()))
