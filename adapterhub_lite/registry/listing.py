"""Many versions at a glance, filtered in the database, and what is shown of one. Lists from rows, not manifests."""

import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry.locks import leased_digests
from adapterhub_lite.registry.manifest import AdapterManifest

if TYPE_CHECKING:
    from adapterhub_lite.registry.store import AdapterRegistry

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
    """All that is known of one version here, beside its manifest."""

    manifest: AdapterManifest
    aliases: tuple[str, ...]
    pinned: bool
    signed: bool
    held: bool
    size: int


class Filter(NamedTuple):
    """A WHERE clause over `versions` with its values."""

    sql: str
    values: list[Any]


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
    return Filter(" AND ".join(clauses), values)


def summarize(connection: sqlite3.Connection, wanted: Filter) -> list[AdapterSummary]:
    """The lines of the versions wanted, by name and version."""
    rows = connection.execute(
        # The clauses are our own, the values are bound.
        "SELECT name, version, digest, base_id, task, created, size, pinned FROM versions v"  # noqa: S608
        f" WHERE {wanted.sql} ORDER BY name, version",
        wanted.values,
    ).fetchall()
    names = {row[0] for row in rows}
    # Of one name only what is its own is read, of several everything: a join over all of them takes longer.
    only, values = ("WHERE name = ?", [*names]) if len(names) == 1 else ("", [])

    def read(columns: str, table: str, order: str) -> Iterator[tuple[Any, ...]]:
        return connection.execute(f"SELECT name, version, {columns} FROM {table} {only} ORDER BY {order}", values)  # noqa: S608

    aliases: defaultdict[tuple[str, int], tuple[str, ...]] = defaultdict(tuple)
    for name, version, alias in read("alias", "aliases", "alias"):
        aliases[name, version] += (alias,)
    tags: defaultdict[tuple[str, int], tuple[str, ...]] = defaultdict(tuple)
    for name, version, tag in read("tag", "tags", "name, version, tag"):
        tags[name, version] += (tag,)
    metrics: defaultdict[tuple[str, int], dict[str, tuple[float, float | None]]] = defaultdict(dict)
    for name, version, metric, ours, bare in read("metric, adapter_value, base_value", "metrics", "name, version"):
        metrics[name, version][metric] = (ours, bare)
    lines = []
    for name, version, digest, base, task, created, size, pinned in rows:
        key = (name, version)
        about = (aliases.get(key, ()), tags.get(key, ()), metrics.get(key, {}))
        lines.append(AdapterSummary(name, version, digest, base, task, created, size, bool(pinned), *about))
    return lines


def describe(registry: "AdapterRegistry", manifest: AdapterManifest) -> AdapterDetails:
    """Everything known here of one version."""
    key = (manifest.name, manifest.version)
    connection = registry.database.read()
    pinned, signed, size = connection.execute(
        "SELECT pinned, signature IS NOT NULL, size FROM versions WHERE name = ? AND version = ?", key
    ).fetchone()
    aliases = connection.execute("SELECT alias FROM aliases WHERE name = ? AND version = ? ORDER BY alias", key)
    held = manifest.digest in leased_digests(registry.home)
    return AdapterDetails(manifest, tuple(row[0] for row in aliases), bool(pinned), bool(signed), held, size)
