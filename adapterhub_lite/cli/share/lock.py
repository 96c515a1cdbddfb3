"""`lock`: the adapters that a project uses, byte for byte, in one file that can be checked offline."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, short, would

LockFileOption = Annotated[Path, typer.Option("--file", help="The lock file.")]


def lock(
    references: Annotated[
        list[str] | None,
        typer.Argument(help="What to lock: references, each optionally with its repository, as sql@prod=org/name."),
    ] = None,
    file: LockFileOption = Path("adapters.lock"),
    check: Annotated[bool, typer.Option("--check", help="Compare the registry with the lock; works offline.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the adapters' base is; searched for in the home if not given.")
    ] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write `adapters.lock`: digests of adapters, base and tokenizer. `pull --locked` pulls what it names.

    With `--check`, the exit code is 1 when something is missing or different.
    Example: `adapterhub-lite lock sql@prod=my-org/sql-lora event`, then `adapterhub-lite lock --check`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.errors import UsageError
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.lock import read_lock, verify_lock, write_lock

    registry = AdapterRegistry(home)
    bases = [resolve_base(base, home=home)] if base else []
    if check:
        if references:
            raise UsageError("--check compares everything in the lock; give it no references.")
        problems = verify_lock(registry.store, read_lock(file), bases=bases)
        if as_json:
            print_json({"file": str(file), "problems": problems})
        for problem in problems:
            say(problem)
        if problems:
            raise typer.Exit(1)
        return say(f"Everything in {file} is in the registry, byte for byte.")
    named = [text.partition("=") for text in references or []]
    sources = {registry.store.resolve(reference).name: source for reference, _, source in named if source}
    if dry_run:
        locked = [registry.store.resolve(reference).reference for reference, _, _ in named]
        return would(f"write {file} with {', '.join(locked) or 'nothing'}", as_json, references=locked)
    written = write_lock(registry.store, [reference for reference, _, _ in named], file, sources=sources, bases=bases)
    if as_json:
        return print_json(written.model_dump(mode="json"))
    rows = [(one.reference, short(one.digest), one.base.id, one.source or "-") for one in written.adapters]
    print_table(str(file), ("adapter", "digest", "base", "pulled from"), rows)


def bring_locked(file: Path, endpoint: str | None, home: str | None, as_json: bool, dry_run: bool) -> None:
    """`pull --locked`: pull what the lock names and the registry lacks."""
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.hub.pull import pull_locked
    from adapterhub_lite.registry.operations.lock import read_lock, verify_lock

    registry, lock = AdapterRegistry(home), read_lock(file)
    if dry_run:
        problems = verify_lock(registry.store, lock)
        return would(f"pull what is missing of {file}: {'; '.join(problems) or 'nothing'}", as_json, problems=problems)
    pulled = pull_locked(registry.store, lock, endpoint=endpoint, progress=say)
    references = [manifest.reference for manifest in pulled]
    if as_json:
        return print_json({"file": str(file), "locked": len(lock.adapters), "pulled": references})
    say(f"{len(lock.adapters)} adapters are locked, {len(pulled)} were missing: {', '.join(references) or 'none'}.")
