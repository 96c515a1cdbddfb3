"""Makes the database again from the manifests and the journal, when it is lost or damaged."""

import contextlib
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import AdapterManifest, read_manifest
from adapterhub_lite.errors import AdapterHubError, RegistryError, SchemaVersionError
from adapterhub_lite.registry.store.database import (
    DATABASE_FILE,
    Database,
    delete_version,
    fsync_folder,
    insert_evaluation,
    insert_version,
)
from adapterhub_lite.registry.store.journal import JournalEntry, insert_entry, read_journal
from adapterhub_lite.registry.store.store import Store


@dataclass(frozen=True)
class RebuildReport:
    """What the new database holds, what could not be taken into it, and where the old one was put."""

    versions: int
    aliases: int
    skipped: tuple[str, ...]
    old_database: Path | None


def rebuild_database(store: Store) -> RebuildReport:
    """Put a database made from `manifests/` and the journal in place of the present one, which is kept beside it.

    Raises:
        SchemaVersionError: a newer version of this project wrote the present one.
    """
    home = store.home
    # What a newer version of this project wrote is not ours to replace; anything else may be damaged.
    try:
        store.read()
    except SchemaVersionError:
        raise
    except (sqlite3.Error, RegistryError):
        pass
    with store.lock(exclusive=True):
        aside = home / f".rebuild-{os.getpid()}"
        aside.mkdir()
        try:
            fresh = Database(aside)
            with fresh.write() as connection:
                skipped = _insert_manifests(store, connection)
                skipped += _replay(connection, read_journal(home))
                versions, aliases = (_count(connection, table) for table in ("versions", "aliases"))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            fresh.close()
            store.database.close()
            old = _keep_old(home)
            (aside / DATABASE_FILE).replace(home / DATABASE_FILE)
            fsync_folder(home)
        finally:
            for path in aside.iterdir():
                path.unlink()
            aside.rmdir()
    return RebuildReport(versions, aliases, tuple(skipped), old)


def _insert_manifests(store: Store, connection: sqlite3.Connection) -> list[str]:
    skipped = []
    # Oldest first, so that a digest resolves to the newest version that has it, as before.
    found: list[tuple[AdapterManifest, bytes | None, bytes]] = []
    gone = _removed(read_journal(store.home))
    for path in sorted((store.home / "manifests").glob("*/*.json")):
        label = str(path.relative_to(store.home))
        try:
            manifest = read_manifest(content := path.read_bytes())
            for name in manifest.files:
                store.file(manifest, name)
        except AdapterHubError as error:
            skipped.append(f"{label}: {error}")
            continue
        if (manifest.name, f"{manifest.version}.json") != (path.parent.name, path.name):
            skipped.append(f"{label}: it is the manifest of {manifest.reference}")
            continue
        if (manifest.name, manifest.version) in gone:
            continue
        signature = path.with_suffix(".sig")
        found.append((manifest, signature.read_bytes() if signature.exists() else None, content))
    for manifest, signed, content in sorted(found, key=lambda item: (item[0].created, item[0].version)):
        insert_version(connection, manifest, signed, content)
    return skipped


def _removed(entries: list[JournalEntry]) -> dict[tuple[str, int | None], int]:
    """The versions that are removed in the end, with the number of the act that did it."""
    gone: dict[tuple[str, int | None], int] = {}
    for entry in entries:
        if entry.act == "remove":
            gone[entry.name, entry.version] = entry.number
        elif entry.act == "restore":
            gone.pop((entry.name, entry.version), None)
    return gone


def _replay(connection: sqlite3.Connection, entries: list[JournalEntry]) -> list[str]:
    skipped = []
    gone = _removed(entries)
    for entry in entries:
        key = (entry.name, entry.version)
        insert_entry(connection, entry)
        if entry.act in ("set", "rollback"):
            connection.execute(
                "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?)", (entry.name, entry.alias, entry.version)
            )
        elif entry.act == "drop":
            connection.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (entry.name, entry.alias))
        elif entry.act == "evaluate" and entry.evaluation is not None and _is_there(connection, key):
            insert_evaluation(connection, entry.name, entry.version or 0, entry.evaluation)
        elif entry.act in ("pin", "unpin"):
            connection.execute(
                "UPDATE versions SET pinned = ? WHERE name = ? AND version = ?", (entry.act == "pin", *key)
            )
        elif entry.version is not None and gone.get(key) == entry.number:
            _replay_removal(connection, entry.name, entry.version, entry.digest or "")
    dangling = connection.execute(
        "SELECT name, alias, version FROM aliases a WHERE NOT EXISTS"
        " (SELECT 1 FROM versions v WHERE (v.name, v.version) = (a.name, a.version))"
    ).fetchall()
    for name, alias, version in dangling:
        skipped.append(f"{name}@{alias}: its version {version} is not there")
        connection.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))
    return skipped


def _is_there(connection: sqlite3.Connection, key: tuple[str, int | None]) -> bool:
    found = connection.execute("SELECT 1 FROM versions WHERE name = ? AND version = ?", key).fetchone()
    return found is not None


def _replay_removal(connection: sqlite3.Connection, name: str, version: int, digest: str) -> None:
    connection.execute(
        "INSERT INTO names VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET last_version = max(last_version, ?2)",
        (name, version),
    )
    delete_version(connection, name, version, digest)


def _count(connection: sqlite3.Connection, table: str) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608


def _keep_old(home: Path) -> Path | None:
    """Put the old database aside under a second name; the first one stays until the new one takes it in one step."""
    database, old = home / DATABASE_FILE, home / f"old-{DATABASE_FILE}"
    if not database.exists():
        return None
    # What is in the log goes into the file, where it can be read at all.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for name in (f"{DATABASE_FILE}-wal", f"{DATABASE_FILE}-shm"):
        # A log belongs to its database: beside another one it would damage it.
        if (home / name).exists():
            (home / name).replace(home / f"old-{name}")
    old.unlink(missing_ok=True)
    try:
        old.hardlink_to(database)
    except OSError:  # a disk without links
        shutil.copyfile(database, old)
    return old
