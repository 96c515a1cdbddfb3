"""`lock`: which adapters a project uses, byte for byte, in one file that can be checked without a network."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, short, would

LockFileOption = Annotated[Path, typer.Option("--file", help="The lock.")]


def lock(
    references: Annotated[
        list[str] | None, typer.Argument(help="What to lock, each as reference or reference=org/name on the hub.")
    ] = None,
    file: LockFileOption = Path("adapters.lock"),
    check: Annotated[bool, typer.Option("--check", help="Compare what is here with the lock; no network.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the adapters' base is; looked for in the home when not given.")
    ] = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write `adapters.lock`: digests of adapters, base and tokenizer. `pull --locked` brings what it names.

    With `--check`, exits with 1 when something is missing or different.
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
        return say(f"Everything in {file} is here, byte for byte.")
    named = [text.partition("=") for text in references or []]
    sources = {registry.resolve(reference).name: source for reference, _, source in named if source}
    if dry_run:
        locked = [registry.resolve(reference).reference for reference, _, _ in named]
        return would(f"write {file} with {', '.join(locked) or 'nothing'}", as_json, references=locked)
    written = write_lock(registry.store, [reference for reference, _, _ in named], file, sources=sources, bases=bases)
    if as_json:
        return print_json(written.model_dump(mode="json"))
    rows = [(one.reference, short(one.digest), one.base.id, one.source or "-") for one in written.adapters]
    print_table(str(file), ("adapter", "digest", "base", "pulled from"), rows)
