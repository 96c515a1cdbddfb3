"""Many versions at a glance, filtered in the database, and what is shown of one. Lists from rows, not manifests."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from adapterhub_lite.adapter_format.manifest import AdapterManifest, EvaluationRecord
from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry.store.database import evaluations_of
from adapterhub_lite.registry.store.store import Store, leased_digests

METRIC = re.compile(r"\s*([\w./ -]*[\w./-])\s*(?:(>=|<=|>|<|=)\s*(-?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*)?")


class AdapterSummary(NamedTuple):
    """One line of a list. `metrics` is metric -> (adapter's value, base's value or None); `size` is in bytes."""

    name: str
    version: int
    digest: str
    base_id: str
    task: str | None
    created: str
    size: int
    pinned: bool
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    metrics: dict[str, tuple[float, float | None]]


class AdapterDetails(NamedTuple):
    """All that is known of one version here, beside its manifest. `evaluation` has what was measured later, too."""

    manifest: AdapterManifest
    aliases: tuple[str, ...]
    pinned: bool
    signed: bool
    held: bool
    size: int
    evaluation: tuple[EvaluationRecord, ...]


class Filter(NamedTuple):
    """A WHERE clause over `versions` with its values; `name` is the only name it lets through, if any."""

    sql: str
    values: list[Any]
    name: str | None = None


def filter_versions(
    name: str | None = None,
    *,
    base: str | None = None,
    task: str | None = None,
    tag: str | None = None,
    metric: str | None = None,
) -> Filter:
    """Versions of `name`, on `base` (its id or the beginning of its fingerprint), for `task`, with `tag`, and with a
    `metric` measured (`"exact_match"`) or in a range (`"exact_match>=0.8"`).

    Raises:
        UsageError: the metric is neither.
    """
    clauses, values = ["1"], list[Any]()
    for column, wanted in (("name", name), ("task", task)):
        if wanted is not None:
            clauses.append(f"{column} = ?")
            values.append(wanted)
    if base is not None:
        clauses.append("(base_id = ? OR (length(?) >= 8 AND substr(base_fingerprint, 1, length(?)) = ?))")
        values += [base, base, base, base]
    if tag is not None:
        clauses.append("EXISTS (SELECT 1 FROM tags t WHERE t.tag = ? AND (t.name, t.version) = (v.name, v.version))")
        values.append(tag)
    if metric is not None:
        match = METRIC.fullmatch(metric)
        if not match:
            raise UsageError(f"Wanted a metric as 'exact_match' or 'exact_match>=0.8', got {metric!r:.80}.")
        measured = "SELECT 1 FROM metrics m WHERE (m.name, m.version) = (v.name, v.version) AND m.metric = ?"
        clauses.append(f"EXISTS ({measured}{f' AND m.adapter_value {match[2]} ?' if match[2] else ''})")
        values += [match[1], float(match[3])] if match[2] else [match[1]]
    return Filter(" AND ".join(clauses), values, name)


def summarize(connection: sqlite3.Connection, wanted: Filter) -> list[AdapterSummary]:
    """The lines of the versions wanted, by name and version."""
    # What belongs to a version is read beside the versions, in the same order, and nothing is gathered in between:
    # on 10,000 lines half of the time would go to the garbage collector otherwise.
    only, values = ("WHERE name = ?", [wanted.name]) if wanted.name is not None else ("", [])

    def beside(columns: str, table: str) -> Callable[[str, int], list[tuple[Any, ...]]]:
        sql = f"SELECT name, version, {columns} FROM {table} {only} ORDER BY name, version, {columns.partition(',')[0]}"  # noqa: S608
        return _taking(connection.execute(sql, values))

    aliases, tags = beside("alias", "aliases"), beside("tag", "tags")
    metrics = beside("metric, adapter_value, base_value", "metrics")
    rows = connection.execute(
        # The clauses are our own, the values are bound.
        "SELECT name, version, digest, base_id, task, created, size, pinned FROM versions v"  # noqa: S608
        f" WHERE {wanted.sql} ORDER BY name, version",
        wanted.values,
    )
    return [
        AdapterSummary(
            name, version, digest, base, task, created, size, bool(pinned),
            tuple([row[2] for row in aliases(name, version)]),
            tuple([row[2] for row in tags(name, version)]),
            {row[2]: row[3:] for row in metrics(name, version)},
        )
        for name, version, digest, base, task, created, size, pinned in rows
    ]  # fmt: skip


def _taking(rows: Iterator[tuple[Any, ...]]) -> Callable[[str, int], list[tuple[Any, ...]]]:
    """A function that takes the rows of one version out of `rows`, both asked for and sorted by name and version."""
    ahead = next(rows, None)

    def take(name: str, version: int) -> list[tuple[Any, ...]]:
        nonlocal ahead
        while ahead is not None and (ahead[0] < name or (ahead[0] == name and ahead[1] < version)):
            ahead = next(rows, None)
        found = []
        while ahead is not None and ahead[1] == version and ahead[0] == name:
            found.append(ahead)
            ahead = next(rows, None)
        return found

    return take


def describe(store: Store, manifest: AdapterManifest) -> AdapterDetails:
    """Everything known here of one version."""
    key = (manifest.name, manifest.version)
    connection = store.read()
    pinned, signed, size = connection.execute(
        "SELECT pinned, signature IS NOT NULL, size FROM versions WHERE name = ? AND version = ?", key
    ).fetchone()
    aliases = connection.execute("SELECT alias FROM aliases WHERE name = ? AND version = ? ORDER BY alias", key)
    held = manifest.digest in leased_digests(store.home)
    return AdapterDetails(
        manifest,
        tuple(row[0] for row in aliases),
        bool(pinned),
        bool(signed),
        held,
        size,
        evaluations_of(connection, manifest),
    )
