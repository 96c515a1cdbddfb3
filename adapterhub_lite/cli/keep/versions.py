"""`add`, `pin`, `unpin`, `remove` and `gc`: what is kept, and what is freed."""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.answer_schema import read_answer_schema
from adapterhub_lite.cli.output import (
    DryRunOption,
    ExampleOption,
    HomeOption,
    JsonOption,
    SchemaOption,
    megabytes,
    print_json,
    print_table,
    say,
    short,
    waiting,
    would,
)
from adapterhub_lite.runs.state import note_added

MOST_ROWS = 50
ReferenceArgument = Annotated[str, typer.Argument(help="name, name:version, name@alias or a digest.")]


def would_add(folder: Path, name: str, convert: bool, as_json: bool) -> None:
    """Say what `add` would do, after the checks that need no base.

    Raises:
        UsageError: not a name, or no such folder.
        AdapterRejectedError: with every problem of the adapter.
    """
    from adapterhub_lite.adapter_format.foreign.opening import open_adapter
    from adapterhub_lite.adapter_format.manifest import is_name
    from adapterhub_lite.bases.fit import inspect_adapter
    from adapterhub_lite.errors import UsageError

    if not is_name(name):
        raise UsageError(f"Expected a name of 1 to 64 letters, digits, '.', '_', '-'; got {name!r:.80}.")
    if not folder.exists():
        raise UsageError(f"There is no adapter folder {str(folder)!r}. Give the folder that training saved.")
    with tempfile.TemporaryDirectory() as scratch:
        # Whatever needs the base to be converted is looked at when it is added.
        _, lora = inspect_adapter(open_adapter(folder, Path(scratch), convert=convert).folder).accepted()
    would(f"add {folder} (rank {lora.rank}) as the next version of {name}", as_json, rank=lora.rank)


def add(
    folder: Annotated[
        Path, typer.Argument(help="An adapter: its folder, a checkpoint, a run, a zip or tar, or one of MLX or GGUF.")
    ],
    name: Annotated[str, typer.Argument(help="The adapter's name; the folder becomes its next version.")],
    base: Annotated[
        str | None,
        typer.Option(help="Its base: a name, a folder or a Hub id; taken from its training record if not given."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--description", "--task", help="What the adapter does, in a few words.")
    ] = None,
    example: ExampleOption = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to search by; may be repeated.")] = None,
    schema: SchemaOption = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Also load the base and replay, or record, how the adapter behaves.")
    ] = False,
    convert: Annotated[
        bool, typer.Option("--convert", help="Convert pickled weights, in a closed process that executes nothing.")
    ] = False,
    base_differs: Annotated[
        bool, typer.Option("--base-differs", help="Accept that the adapter names another base than the one given.")
    ] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter folder made elsewhere and add it as the next version of a name; all or nothing.

    Example: `adapterhub-lite add ./my-lora sql --base smollm2-135m`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry

    answer_schema = read_answer_schema(schema)
    if dry_run:
        return would_add(folder, name, convert, as_json)
    resolved = resolve_base(base, home=home, progress=say) if base else None
    said: list[str] = []
    with waiting(f"checking {folder}"):
        manifest = AdapterRegistry(home).add(
            folder,
            name,
            base=resolved,
            task=task, examples=example or (), tags=tag or (), answer_schema=answer_schema,
            verify="probes" if probes else "files",
            convert=convert, base_differs=base_differs, tell=said.append,
        )  # fmt: skip
    note_added(folder, manifest.reference)
    for line in said:
        say(line)
    if as_json:
        return print_json(manifest.model_dump(mode="json"))
    say(
        f"{manifest.reference} ({short(manifest.digest)}), bound to {manifest.lora.modules_bound} of "
        f"{manifest.lora.modules_total} modules of {manifest.base.id}."
    )


def pin(
    reference: ReferenceArgument, dry_run: DryRunOption = False, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Protect one version from `gc` until `unpin`.

    Example: `adapterhub-lite pin sql:3`
    """
    _set_pin(reference, home, as_json, pinned=True, dry_run=dry_run)


def unpin(
    reference: ReferenceArgument, dry_run: DryRunOption = False, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Remove a pin.

    Example: `adapterhub-lite unpin sql:3`
    """
    _set_pin(reference, home, as_json, pinned=False, dry_run=dry_run)


def _set_pin(reference: str, home: str | None, as_json: bool, *, pinned: bool, dry_run: bool) -> None:
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    manifest = registry.store.resolve(reference)
    if dry_run:
        return would(f"{'pin' if pinned else 'unpin'} {manifest.reference}", as_json, reference=manifest.reference)
    (registry.pin if pinned else registry.unpin)(manifest.reference)
    if as_json:
        return print_json({"reference": manifest.reference, "digest": manifest.digest, "pinned": pinned})
    say(f"{manifest.reference} is pinned." if pinned else f"{manifest.reference} is not pinned.")


def remove(
    reference: Annotated[str, typer.Argument(help="The version, for example sql:3.")],
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove one version; the next `gc` frees its bytes, and its number is never reused.

    Refused while an alias, a pin or a running server uses it. Example: `adapterhub-lite remove sql:3`
    """
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.gc import check_removable, one_version

    registry = AdapterRegistry(home)
    if dry_run:
        check_removable(registry.store.read(), registry.home, one_version(registry.store, reference))
        return would(f"remove {reference}", as_json, reference=reference)
    registry.remove(reference)
    if as_json:
        return print_json({"removed": reference})
    say(f"{reference} is removed. `adapterhub-lite gc` frees its bytes.")


def gc(
    keep_newest: Annotated[int, typer.Option(help="Number of newest versions to keep of each name.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be freed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Free without asking.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Free the versions that no alias, pin, merge or running server uses; they are listed first.

    Example: `adapterhub-lite gc --keep-newest 3 --dry-run`
    """
    from adapterhub_lite.errors import UsageError
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    plan = registry.plan_gc(keep_newest=keep_newest)
    if not as_json:
        stays = sorted(plan.kept.items())
        print_table("Kept", ("version", "reason"), stays[:MOST_ROWS])
        if len(stays) > MOST_ROWS:
            say(f"... and {len(stays) - MOST_ROWS} more; --json lists them all.")
        if plan.versions:
            print_table("To be freed", ("version",), [(reference,) for reference in plan.versions])
        say(
            f"{len(plan.versions)} versions, {len(plan.objects)} files and {len(plan.leftovers)} leftovers of crashes "
            f"can be freed: {megabytes(plan.freed_bytes)}."
        )
    nothing = not (plan.versions or plan.objects or plan.leftovers)
    free = not (dry_run or nothing)
    if free and not yes:
        if as_json or not sys.stdin.isatty():
            raise UsageError("Nothing was freed: give --yes to free it, or --dry-run to only see what would be freed.")
        free = typer.confirm("Free it?", err=True)
    done = registry.gc(keep_newest=keep_newest, announced=plan) if free else plan
    if as_json:
        return print_json({"freed": free, **asdict(done)})
    if free:
        say(f"Freed {megabytes(done.freed_bytes)}.")
