"""`backup` and `restore`: a registry in one file, and back."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, megabytes, print_json, say, waiting, would


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; must not exist yet.")],
    keys: Annotated[bool, typer.Option("--keys", help="Also save the private signing keys.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Save every version with its aliases, history and signatures in one file; it is read back and verified.

    The registry may be in use meanwhile. Bases and training runs are not saved.
    Example: `adapterhub-lite backup ./adapters.tar`
    """
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.backup import check_target

    registry = AdapterRegistry(home)
    if dry_run:
        check_target(file)
        versions = len(registry.summaries())
        return would(f"write {versions} versions of {registry.home} into {file}", as_json, versions=versions)
    with waiting(f"writing {file}"):
        written = registry.backup(file, keys=keys)
    if as_json:
        return print_json({"file": str(file), "versions": written.versions, "bytes": written.size})
    say(f"{file}: {written.versions} versions, {len(written.files)} files, {megabytes(written.size)}, verified.")


def restore(
    file: Annotated[Path, typer.Argument(help="A file that `backup` wrote.")],
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup into a home without a registry; every byte is verified before any version is visible.

    With `--dry-run` the file is only verified. Example: `adapterhub-lite restore ./adapters.tar --home ./restored`
    """
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.backup import check_backup

    registry = AdapterRegistry(home)
    if dry_run:
        found = check_backup(file)
        act = f"restore {found.versions} versions of {found.created}, {megabytes(found.size)}, into {registry.home}"
        return would(act, as_json, versions=found.versions, bytes=found.size)
    with waiting(f"restoring {file}"):
        found = registry.restore(file)
    if as_json:
        return print_json({"home": str(registry.home), "versions": found.versions, "bytes": found.size})
    say(f"{registry.home}: {found.versions} versions of {found.created}, verified.")
