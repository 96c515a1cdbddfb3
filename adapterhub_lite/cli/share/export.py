"""`export`: versions in the layouts that other programs read."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, say, waiting, would


def export(
    references: Annotated[list[str], typer.Argument(help="name, name:version, name@alias or a digest.")],
    target: Annotated[Path, typer.Argument(help="Folder (for gguf: file) to write; must not exist yet.")],
    layout: Annotated[
        str,
        typer.Option(help="peft: a plain folder; vllm: a folder for its LoRA resolver; gguf: a file, by llama.cpp."),
    ] = "peft",
    base: Annotated[
        str | None, typer.Option(help="Where the base is, for gguf; searched for in the home if not given.")
    ] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write versions for other programs: a plain PEFT folder, vLLM's resolver layout, or a GGUF LoRA.

    Example: `adapterhub-lite export sql@prod ./sql-lora`, or `adapterhub-lite export sql event ./loras --layout vllm`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.export import export_gguf, export_vllm

    if layout not in ("peft", "vllm", "gguf"):
        raise ConfigurationError(f"There is no layout {layout!r}. Known: peft, vllm, gguf.")
    if layout != "vllm" and len(references) != 1:
        raise ConfigurationError(f"The layout {layout} takes one adapter, got {len(references)}.")
    registry = AdapterRegistry(home)
    if dry_run:
        if target.exists():
            raise ConfigurationError(f"{target} already exists; give another path.")
        named = ", ".join(registry.resolve(reference).reference for reference in references)
        return would(f"write {named} to {target} in the layout {layout}", as_json, target=str(target))
    if layout == "vllm":
        manifests = [registry.resolve(reference) for reference in references]
        written = export_vllm(registry.store, manifests, target)
        # vLLM accepts powers of two from 8 upwards.
        widest = max(8, *(1 << (m.lora.rank - 1).bit_length() for m in manifests))
        bases = sorted({m.base.id for m in manifests})
        use = (
            "vLLM serves them with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=lora_filesystem_resolver "
            f"VLLM_LORA_RESOLVER_CACHE_DIR={target} vllm serve {' or '.join(bases)} --enable-lora "
            f"--max-lora-rank {widest}"
        )
    elif layout == "gguf":
        with waiting(f"converting {references[0]}"):
            resolved = resolve_base(base, home=home) if base else None
            written = [export_gguf(registry.store, registry.resolve(references[0]), target, base=resolved)]
        use = f"llama.cpp loads it with --lora {target}"
    else:
        written = [registry.export(references[0], target)]
        use = f"PeftModel.from_pretrained(base, {str(target)!r}) loads it"
    if as_json:
        return print_json({"references": references, "layout": layout, "written": [str(path) for path in written]})
    say(f"{', '.join(references)}: in {target}; {use}.")
