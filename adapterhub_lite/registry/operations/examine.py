"""Looks over a whole registry and says what is wrong; makes the database again from the manifests and the journal.

A problem is something lost or false. What a crash may leave lying about (half-written files, unlisted manifests,
unreferenced objects) is a note: nothing sees it, and the next collection takes it away.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.lora_config import ConfigProblems, read_lora_config
from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    AdapterManifest,
    adapter_digest,
    read_manifest,
)
from adapterhub_lite.errors import AdapterHubError, SchemaVersionError
from adapterhub_lite.registry.operations.gc import plan_collection
from adapterhub_lite.registry.operations.sign import signature_problem
from adapterhub_lite.registry.store.journal import read_journal
from adapterhub_lite.registry.store.store import Store, file_record


@dataclass(frozen=True)
class DoctorReport:
    """What was found. `problems` empty: nothing is lost or false; `notes` are leftovers that nothing sees."""

    versions: int
    objects: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def examine_registry(store: Store) -> DoctorReport:
    """Read everything, every byte of every object included, and compare; changes nothing.

    Raises:
        SchemaVersionError: a newer version of this project wrote the registry.
    """
    objects = list(store.objects)
    problems = [f"object {sha256:.16}... is damaged" for sha256, path in objects if file_record(path).sha256 != sha256]
    connection = store.read()
    connection.execute("BEGIN")
    try:
        problems += [f"database: {row[0]}" for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
        rows = connection.execute("SELECT name, version, digest, manifest, signature FROM versions").fetchall()
        for name, version, digest, content, signature in rows:
            found = _version_problems(store, name, version, digest, content, signature)
            problems += [f"{name}:{version}: {problem}" for problem in found]
        problems += _table_problems(connection, store.home)
        notes = [] if problems else _leftovers(store, len(rows))
    except sqlite3.DatabaseError as error:
        return DoctorReport(0, len(objects), (*problems, f"database: {error}; rebuild it"), ())
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")
    return DoctorReport(len(rows), len(objects), tuple(problems), tuple(notes))


def _leftovers(store: Store, versions: int) -> list[str]:
    """What a collection would sweep without taking any version; asked only where everything can be read."""
    plan = plan_collection(store, keep_newest=versions)
    found = [f"{len(plan.objects)} objects that nothing refers to"] if plan.objects else []
    return found + [f"left over: {path.relative_to(store.home)}" for path in plan.leftovers]


def _version_problems(
    store: Store, name: str, version: int, digest: str, content: bytes, signature: bytes | None
) -> Iterator[str]:
    try:
        manifest = read_manifest(content)
    except SchemaVersionError:
        raise
    except AdapterHubError as error:
        yield str(error)
        return
    if (manifest.name, manifest.version, manifest.digest) != (name, version, digest):
        yield f"the database and its manifest disagree on what it is ({manifest.reference}, {manifest.digest:.19}...)"
    path = store.manifest_path(name, version)
    if not path.is_file() or path.read_bytes() != content:
        yield f"{path.relative_to(store.home)} is missing or differs from the database"
    if signature is not None and (problem := signature_problem(manifest, signature)):
        yield problem
    yield from _file_problems(store, manifest)


def _file_problems(store: Store, manifest: AdapterManifest) -> Iterator[str]:
    missing = False
    for filename in manifest.files:
        try:
            store.file(manifest, filename)
        except AdapterHubError as error:
            missing = True
            yield str(error)
    if missing:
        return
    try:
        config = read_lora_config(store.file(manifest, CONFIG_FILE).read_bytes())
    except ConfigProblems as error:
        yield str(error)
        return
    digest = adapter_digest(config.deciding(), manifest.files, manifest.base.fingerprint, manifest.answer_schema)
    if digest != manifest.digest:
        yield f"its files make the digest {digest:.19}..., the manifest says {manifest.digest:.19}..."


def _table_problems(connection: sqlite3.Connection, home: Path) -> Iterator[str]:
    dangling = (
        "SELECT a.name, alias, a.version FROM aliases a LEFT JOIN versions v USING (name, version) WHERE v.name IS NULL"
    )
    for name, alias, version in connection.execute(dangling):
        yield f"{name}@{alias} points at version {version}, which is not there"
    behind = (
        "SELECT v.name FROM versions v LEFT JOIN names n USING (name)"
        " GROUP BY v.name HAVING max(v.version) > coalesce(max(n.last_version), 0)"
    )
    for (name,) in connection.execute(behind):
        yield f"the version counter of {name} is behind its versions"
    recorded = {entry.number: entry for entry in read_journal(home)}
    for number, act, name, version in connection.execute("SELECT number, act, name, version FROM journal"):
        entry = recorded.get(number)
        if entry is None or (entry.act, entry.name, entry.version) != (act, name, version):
            yield f"act {number} ({act} {name}) is not in the journal file"
            return
