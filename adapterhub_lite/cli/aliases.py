"""`alias` and `rollback`: names that move between versions, and back."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say

NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
AliasArgument = Annotated[str, typer.Argument(help="The alias, for example prod.")]


def alias(
    name: NameArgument,
    alias_name: Annotated[str | None, typer.Argument(metavar="[ALIAS]", help="The alias to set.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version it should point to.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version; with only a name, list that adapter's aliases.

    Example: `adapterhub-lite alias sql prod 3`
    """
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    if alias_name is not None:
        if version is None:
            raise ConfigurationError(
                f"Which version should {name}@{alias_name} point to? Give a number after the alias."
            )
        registry.set_alias(name, alias_name, version=version)
    aliases = registry.aliases(name)
    if as_json:
        return print_json({"name": name, "aliases": aliases})
    print_table(f"Aliases of {name}", ("alias", "version"), list(aliases.items()))


def rollback(
    name: NameArgument,
    alias_name: AliasArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move an alias back to the version it pointed to before.

    Example: `adapterhub-lite rollback sql prod`
    """
    from adapterhub_lite.registry import AdapterRegistry

    registry = AdapterRegistry(home)
    registry.rollback(name, alias_name)
    version = registry.aliases(name)[alias_name]
    if as_json:
        return print_json({"name": name, "alias": alias_name, "version": version})
    say(f"{name}@{alias_name} points to version {version} again.")
