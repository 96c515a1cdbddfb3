"""From a manifest to rows of the database and back: the one place that knows the columns of a version."""

import sqlite3
from functools import lru_cache

from pydantic import ValidationError

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.reference import AdapterReference
from adapterhub_lite.errors import RegistryError, UnknownNameError
from adapterhub_lite.registry.store.database import no_such_name


def insert_version(connection: sqlite3.Connection, manifest: AdapterManifest, signature: bytes | None) -> None:
    """Make a version known; part of the caller's transaction."""
    key = (manifest.name, manifest.version)
    size = sum(record.size for record in manifest.files.values())
    base = manifest.base
    connection.execute(
        "INSERT INTO versions"
        " (name, version, digest, manifest, signature, base_id, base_fingerprint, task, created, size)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, manifest.digest, manifest.to_bytes(), signature, base.id, base.fingerprint, manifest.task,
         manifest.created, size),
    )  # fmt: skip
    connection.execute("DELETE FROM removed WHERE name = ? AND version = ?", key)
    connection.execute(
        "INSERT INTO names VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET last_version = max(last_version, ?)",
        (*key, manifest.version),
    )
    connection.executemany("INSERT OR IGNORE INTO tags VALUES (?, ?, ?)", [(*key, tag) for tag in manifest.tags])
    connection.executemany(
        "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)",
        [(*key, e.metric, e.data, e.adapter_value, e.base_value) for e in manifest.evaluation],
    )


def delete_version(connection: sqlite3.Connection, name: str, version: int, digest: str) -> None:
    """Forget a version for good; its number is never given again."""
    for table in ("versions", "tags", "metrics"):
        connection.execute(f"DELETE FROM {table} WHERE name = ? AND version = ?", (name, version))  # noqa: S608
    connection.execute("INSERT OR REPLACE INTO removed VALUES (?, ?, ?)", (name, version, digest))


def find_manifest(connection: sqlite3.Connection, reference: AdapterReference) -> AdapterManifest:
    """The manifest that `reference` names.

    Raises:
        UnknownNameError: there is none.
    """
    if reference.digest:
        sql, values = "SELECT manifest FROM versions WHERE digest = ? ORDER BY rowid DESC LIMIT 1", [reference.digest]
    elif reference.version is not None:
        sql = "SELECT manifest FROM versions WHERE name = ? AND version = ?"
        values = [str(reference.name), str(reference.version)]
    elif reference.alias:
        sql = "SELECT manifest FROM aliases JOIN versions USING (name, version) WHERE name = ? AND alias = ?"
        values = [str(reference.name), reference.alias]
    else:
        sql, values = (
            "SELECT manifest FROM versions WHERE name = ? ORDER BY version DESC LIMIT 1",
            [str(reference.name)],
        )
    row = connection.execute(sql, values).fetchone()
    if row is None:
        raise _unknown(connection, reference)
    return parse_stored(row[0])


@lru_cache(maxsize=4096)
def parse_stored(content: bytes) -> AdapterManifest:
    """Parse a manifest of our own database. Manifests are immutable, so each is parsed once.

    Raises:
        RegistryError: it is damaged.
    """
    try:
        return AdapterManifest.model_validate_json(content)
    except ValidationError as error:
        raise RegistryError("A manifest in the database is damaged. Run `adapterhub-lite doctor --rebuild`.") from error


def _unknown(connection: sqlite3.Connection, reference: AdapterReference) -> UnknownNameError:
    if reference.digest:
        return UnknownNameError(f"There is no adapter with the digest {reference.digest} here; pull it first.")
    name = str(reference.name)
    versions = [
        str(row[0])
        for row in connection.execute("SELECT version FROM versions WHERE name = ? ORDER BY version", [name])
    ]
    if not versions:
        return no_such_name(connection, name)
    if reference.alias:
        aliases = connection.execute("SELECT alias FROM aliases WHERE name = ? ORDER BY alias", [name])
        return UnknownNameError.among(f"alias of {name!r} called", reference.alias, [row[0] for row in aliases])
    gone = connection.execute(
        "SELECT 1 FROM removed WHERE name = ? AND version = ?", (name, reference.version)
    ).fetchone()
    if gone:
        return UnknownNameError(f"Version {reference.version} of {name!r} was removed; its number is not used again.")
    return UnknownNameError.among(f"version of {name!r}", str(reference.version), versions[-20:])
