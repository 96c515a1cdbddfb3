"""`alias`, `rollback` and `history`: names that move between versions, and back."""

from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, would

if TYPE_CHECKING:
    from adapterhub_lite.registry import AdapterRegistry

NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
AliasArgument = Annotated[str, typer.Argument(help="The alias, for example prod.")]


def alias(
    name: NameArgument,
    alias_name: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="The alias to set.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version it should point to.")] = None,
    expect: Annotated[
        int | None, typer.Option(help="Move it only if it points to this version now; 0: only if there is none.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away; its history stays.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; with only a name, list that adapter's aliases.

    Example: `adapterhub-lite alias sql prod 3 --expect 2`
    """
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    if remove:
        if alias_name is None or version is not None or expect is not None:
            raise ConfigurationError("--remove takes the adapter's name and the alias, and nothing else.")
        if dry_run:
            return would(f"take {registry.resolve(f'{name}@{alias_name}').reference} the alias {alias_name}", as_json)
        registry.remove_alias(name, alias_name)
    elif alias_name is not None:
        if version is None:
            raise ConfigurationError(
                f"Which version should {name}@{alias_name} point to? Give a number after the alias."
            )
        if dry_run:
            return _would_move(registry, f"{name}@{alias_name}", version, expect, as_json)
        registry.set_alias(name, alias_name, version=version, expect=expect)
    registry.resolve(name)  # a name that nobody has is a mistake, not an empty list
    aliases = registry.aliases(name)
    if as_json:
        return print_json({"name": name, "aliases": aliases})
    print_table(f"Aliases of {name}", ("alias", "version"), list(aliases.items()))


def _would_move(registry: "AdapterRegistry", alias: str, version: int, expect: int | None, as_json: bool) -> None:
    from adapterhub_lite.errors import AliasConflictError

    name, _, label = alias.partition("@")
    wanted, now = registry.resolve(f"{name}:{version}"), registry.aliases(name).get(label)
    if expect is not None and (now or 0) != expect:
        raise AliasConflictError(f"{alias} was expected at version {expect or 'none'} and is at {now or 'none'}.")
    would(f"point {alias}, now at {now or 'nothing'}, at {wanted.reference}", as_json, previous=now, version=version)


def rollback(
    name: NameArgument,
    alias_name: AliasArgument,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move an alias back to the version it pointed to before.

    Example: `adapterhub-lite rollback sql prod`
    """
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.registry.operations.aliases import earlier_version

    registry = AdapterRegistry(home)
    if dry_run:
        now, back = earlier_version(registry.store.read(), name, alias_name)
        return would(f"move {name}@{alias_name} from {now} back to {back}", as_json, previous=now, version=back)
    registry.rollback(name, alias_name)
    version = registry.aliases(name)[alias_name]
    if as_json:
        return print_json({"name": name, "alias": alias_name, "version": version})
    say(f"{name}@{alias_name} points to version {version} again.")


def history(
    name: NameArgument,
    alias_name: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="Only this alias.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every move of an adapter's aliases, oldest first. Times are UTC.

    Example: `adapterhub-lite history sql prod`
    """
    from dataclasses import asdict

    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    moves = registry.history(name, alias_name)
    if not moves:
        registry.resolve(name)  # refuses a name that nothing has
    if as_json:
        return print_json([asdict(move) for move in moves])
    rows = [(move.at, move.alias, move.act, move.previous or "-", move.version or "-") for move in moves]
    print_table(f"Aliases of {name}", ("when", "alias", "act", "from", "to"), rows)
