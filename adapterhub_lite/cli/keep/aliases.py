"""`alias`, `rollback` and `history`: names that move between versions, and back again."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, would

NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
AliasArgument = Annotated[str, typer.Argument(help="The alias, for example prod.")]


def alias(
    name: NameArgument,
    alias_name: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="The alias to set.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version it should point to.")] = None,
    expect: Annotated[
        int | None, typer.Option(help="Move it only if it now points to this version; 0: only if it does not exist.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias; its history is kept.")] = False,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; with only a name, list that adapter's aliases.

    Example: `adapterhub-lite alias sql prod 3 --expect 2`
    """
    from adapterhub_lite.errors import AliasConflictError, ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    if remove:
        if alias_name is None or version is not None or expect is not None:
            raise ConfigurationError("--remove takes only the adapter's name and the alias.")
        if dry_run:
            return would(
                f"remove {name}@{alias_name} from {registry.store.resolve(f'{name}@{alias_name}').reference}", as_json
            )
        registry.remove_alias(name, alias_name)
    elif alias_name is not None:
        if version is None:
            raise ConfigurationError(
                f"Which version should {name}@{alias_name} point to? Give a number after the alias."
            )
        if dry_run:
            label, target = f"{name}@{alias_name}", registry.store.resolve(f"{name}:{version}").reference
            now = registry.aliases(name).get(alias_name)
            if expect is not None and (now or 0) != expect:
                raise AliasConflictError(
                    f"{label} was expected at version {expect or 'none'} but is at {now or 'none'}."
                )
            act = f"point {label}, now at {now or 'nothing'}, at {target}"
            return would(act, as_json, previous=now, version=version)
        registry.set_alias(name, alias_name, version=version, expect=expect)
    registry.store.resolve(name)  # an unknown name is a mistake, not an empty list
    aliases = registry.aliases(name)
    if as_json:
        return print_json({"name": name, "aliases": aliases})
    print_table(f"Aliases of {name}", ("alias", "version"), list(aliases.items()))


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
        registry.store.resolve(name)  # refuses an unknown name
    if as_json:
        return print_json([asdict(move) for move in moves])
    rows = [(move.at, move.alias, move.act, move.previous or "-", move.version or "-") for move in moves]
    print_table(f"Aliases of {name}", ("when", "alias", "action", "from", "to"), rows)
