"""Aliases move by compare-and-swap, keep their history, and go back in one step. Works inside a transaction."""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import is_alias
from adapterhub_lite.errors import AliasConflictError, UnknownNameError, UsageError
from adapterhub_lite.registry.store.database import no_such_name
from adapterhub_lite.registry.store.journal import record_act


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias, from `previous` to `version` (None: there was none, or it was dropped). `at` is UTC."""

    alias: str
    act: str
    version: int | None
    previous: int | None
    at: str


def move_alias(
    connection: sqlite3.Connection, home: Path, name: str, alias: str, version: int, expect: int | None
) -> None:
    """Point `alias` at `version`; with `expect` only if it points there now (0: only if there is no such alias).

    Raises:
        AliasConflictError: it points elsewhere.
        UnknownNameError: no such version.
        UsageError: not a name for an alias.
    """
    if not is_alias(alias):
        raise UsageError(
            f"Wanted an alias of 1 to 64 letters, digits, '.', '_', '-', not only digits; got {alias!r:.80}."
        )
    found = connection.execute("SELECT version FROM versions WHERE name = ?", [name]).fetchall()
    if not found:
        raise no_such_name(connection, name)
    if (version,) not in found:
        raise UnknownNameError.among(f"version of {name!r}", str(version), [str(row[0]) for row in found][-20:])
    current = current_version(connection, name, alias)
    if expect is not None and (current or 0) != expect:
        raise AliasConflictError(
            f"{name}@{alias} was expected at version {expect or 'none'} and is at {current or 'none'}: "
            "somebody else moved it. Look at its history and try again."
        )
    if current != version:
        _point(connection, home, "set", name, alias, version, current)


def earlier_version(connection: sqlite3.Connection, name: str, alias: str) -> tuple[int, int]:
    """(where `alias` points, where it pointed before and could go back to).

    Raises:
        UnknownNameError: no such alias.
        UsageError: it has never pointed anywhere else that still exists.
    """
    current = current_version(connection, name, alias)
    if current is None:
        known = connection.execute("SELECT alias FROM aliases WHERE name = ?", [name]).fetchall()
        raise UnknownNameError.among(f"alias of {name!r} called", alias, [row[0] for row in known])
    there = {row[0] for row in connection.execute("SELECT version FROM versions WHERE name = ?", [name])}
    earlier = [v for v in _earlier(alias_history(connection, name, alias)) if v in there and v != current]
    if not earlier:
        raise UsageError(f"{name}@{alias} has no earlier version to go back to; it is at {current}.")
    return current, earlier[-1]


def roll_back(connection: sqlite3.Connection, home: Path, name: str, alias: str) -> int:
    """Point `alias` where it pointed before, one further back at each call; returns the version. Raises as
    `earlier_version` does.
    """
    current, earlier = earlier_version(connection, name, alias)
    _point(connection, home, "rollback", name, alias, earlier, current)
    return earlier


def drop_alias(connection: sqlite3.Connection, home: Path, name: str, alias: str) -> None:
    """Take an alias away; its history stays.

    Raises:
        UnknownNameError: no such alias.
    """
    current = current_version(connection, name, alias)
    if current is None:
        raise UnknownNameError(f"There is no alias {name}@{alias}.")
    record_act(connection, home, act="drop", name=name, alias=alias, previous=current)
    connection.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))


def alias_history(connection: sqlite3.Connection, name: str, alias: str | None = None) -> list[AliasMove]:
    """Every move of the aliases of `name` (or of one of them), oldest first."""
    rows = connection.execute(
        "SELECT alias, act, version, previous, at FROM journal WHERE name = ? AND alias IS NOT NULL"
        " AND (?2 IS NULL OR alias = ?2) ORDER BY number",
        (name, alias),
    )
    return [AliasMove(*row) for row in rows]


def current_version(connection: sqlite3.Connection, name: str, alias: str) -> int | None:
    """Where an alias points now."""
    row = connection.execute("SELECT version FROM aliases WHERE name = ? AND alias = ?", (name, alias)).fetchone()
    return row[0] if row else None


def _point(
    connection: sqlite3.Connection, home: Path, act: str, name: str, alias: str, version: int, previous: int | None
) -> None:
    record_act(connection, home, act=act, name=name, alias=alias, version=version, previous=previous)
    connection.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (name, alias, version))


def _earlier(moves: list[AliasMove]) -> list[int]:
    """The versions before the present one, newest last: a roll-back takes away what it went back over."""
    stack: list[int] = []
    for move in moves:
        if move.act == "rollback" and move.version in stack:
            while stack[-1] != move.version:
                stack.pop()
        elif move.version is not None:
            stack.append(move.version)
    return stack[:-1]
