"""The SQLite database of names, versions and aliases: schema, connections, and from a manifest to rows and back.

Knows no adapter files. Write-ahead logging with synchronous=FULL: readers never wait, and what COMMIT has acknowledged
is on disk. The same for files, with the functions at the end: a name is on disk once its folder was fsynced, which holds
for a folder's own name too, so a file is written aside, fsynced, renamed, and the folder fsynced.
"""

import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from adapterhub_lite.adapter_format.manifest import AdapterManifest, AdapterReference, EvaluationRecord
from adapterhub_lite.errors import RegistryError, SchemaVersionError, UnknownNameError

DATABASE_FILE = "registry.db"
DATABASE_VERSION = 1
BUSY_SECONDS = 60.0
SCHEMA = """
CREATE TABLE names (name TEXT PRIMARY KEY, last_version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, manifest BLOB NOT NULL, signature BLOB,
    base_id TEXT NOT NULL, base_fingerprint TEXT NOT NULL, task TEXT, created TEXT NOT NULL, size INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (name, version));
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE removed (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (name, version)) WITHOUT ROWID;
CREATE TABLE tags (
    name TEXT NOT NULL, version INTEGER NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (tag, name, version)) WITHOUT ROWID;
CREATE TABLE metrics (
    name TEXT NOT NULL, version INTEGER NOT NULL, metric TEXT NOT NULL, data TEXT NOT NULL,
    adapter_value REAL NOT NULL, base_value REAL, PRIMARY KEY (name, version, metric, data)) WITHOUT ROWID;
CREATE TABLE aliases (
    name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name, alias)) WITHOUT ROWID;
CREATE TABLE journal (
    number INTEGER PRIMARY KEY AUTOINCREMENT, act TEXT NOT NULL, name TEXT NOT NULL, alias TEXT, version INTEGER,
    previous INTEGER, digest TEXT, at TEXT NOT NULL);
CREATE INDEX journal_by_name ON journal (name, alias);
"""
# A list reads these alone: the manifests, which lie between the columns of a version, are long.
LIST_INDEXES = (
    "CREATE INDEX IF NOT EXISTS versions_listed ON versions"
    " (name, version, digest, base_id, task, created, size, pinned)",
    "CREATE INDEX IF NOT EXISTS tags_by_version ON tags (name, version)",
)


class Database:
    """`registry.db` under a home folder; a connection for each thread and process.

    An absent one reads as empty, unless there are manifests: then it is lost, and RegistryError says how it is rebuilt.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / DATABASE_FILE
        self._local = threading.local()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction while no other writer has one; rolled back when the block raises.

        The caller holds the store's lock, so that a rebuild never replaces the database under a writer.
        """
        connection = self._connection(create=True)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def read(self) -> sqlite3.Connection:
        """A connection to read from; an empty database in memory where there is none on disk yet."""
        return self._connection(create=False)

    def close(self) -> None:
        """Close this thread's connection; the next call opens another."""
        held = getattr(self._local, "connection", None)
        self._local.connection = None
        # SQLite forbids using, and so closing, a connection that was opened before a fork.
        if held is not None and self._local.opened[0] == os.getpid():
            held.close()

    def _connection(self, *, create: bool) -> sqlite3.Connection:
        held: sqlite3.Connection | None = getattr(self._local, "connection", None)
        opened = self._local.opened if held is not None else None
        # Another process after a fork, or another file after a rebuild, wants another connection.
        if held is not None and opened == (os.getpid(), _inode(self.path)) and (self._local.writable or not create):
            return held
        if held is not None:
            self.close()
        found = self._open_or_create() if create else self._open_existing()
        if found is None:
            # Not kept: another process may fill the file at any moment.
            empty = sqlite3.connect(":memory:", isolation_level=None)
            empty.executescript(SCHEMA)
            return empty
        connection = found
        self._local.connection, self._local.writable = connection, create
        self._local.opened = (os.getpid(), _inode(self.path))
        return connection

    def _open_existing(self) -> sqlite3.Connection | None:
        """A connection, or None where nobody has written a database yet."""
        if not self.path.exists():
            self._check_lost()
            return None
        # Read-only where the folder is: WAL wants to write beside the database even to read it.
        writable = os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        log = self.path.with_name(f"{self.path.name}-wal")
        mode = "ro" if log.exists() else "ro&immutable=1"
        connection = self._connect("rw" if writable else mode)
        if self._check_version(connection) == 0:
            self._check_lost()
            connection.close()
            return None
        return connection

    def _open_or_create(self) -> sqlite3.Connection:
        make_folder(self.path.parent)
        connection = self._connect("rwc")
        if self._check_version(connection) == 0:
            self._check_lost()
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            # Another process may have been first.
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={DATABASE_VERSION}")
            connection.execute("COMMIT")
            fsync_folder(self.path.parent)
        for statement in LIST_INDEXES:
            connection.execute(statement)
        return connection

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _check_version(self, connection: sqlite3.Connection) -> int:
        """The schema version; 0 where there is no schema yet."""
        found = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if found > DATABASE_VERSION:
            connection.close()
            raise SchemaVersionError(
                f"{self.path} has schema version {found}, this version of adapterhub-lite reads up to "
                f"{DATABASE_VERSION}. Upgrade adapterhub-lite, or set ADAPTERHUB_HOME to another folder."
            )
        return found

    def _check_lost(self) -> None:
        """Manifests without a database: numbers would start again at 1, over versions that are there."""
        if next(self.path.parent.glob("manifests/*/*.json"), None) is not None:
            raise RegistryError(
                f"{self.path} is gone or empty, but there are manifests of versions beside it. "
                "Run `adapterhub-lite doctor --rebuild`."
            )


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def known_names(connection: sqlite3.Connection) -> list[str]:
    """Every name that has a version."""
    return [row[0] for row in connection.execute("SELECT DISTINCT name FROM versions ORDER BY name")]


def no_such_name(connection: sqlite3.Connection, name: str) -> UnknownNameError:
    """The error for a name without versions."""
    return UnknownNameError.among("adapter", name, known_names(connection))


def insert_version(
    connection: sqlite3.Connection, manifest: AdapterManifest, signature: bytes | None, content: bytes | None = None
) -> None:
    """Make a version known; part of the caller's transaction.

    `content` are the bytes of a manifest that is written already, by an earlier version of this project it may be.
    """
    key = (manifest.name, manifest.version)
    size = sum(record.size for record in manifest.files.values())
    base = manifest.base
    connection.execute(
        "INSERT INTO versions"
        " (name, version, digest, manifest, signature, base_id, base_fingerprint, task, created, size)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, manifest.digest, content or manifest.to_bytes(), signature, base.id, base.fingerprint, manifest.task,
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


def stored_version(connection: sqlite3.Connection, name: str, version: int) -> AdapterManifest | None:
    """The manifest of one version, or None where there is none."""
    row = connection.execute("SELECT manifest FROM versions WHERE name = ? AND version = ?", (name, version)).fetchone()
    return parse_stored(row[0]) if row else None


def stored_digest(connection: sqlite3.Connection, name: str, digest: str) -> AdapterManifest | None:
    """The newest version of `name` with this digest, or None where there is none."""
    row = connection.execute(
        "SELECT manifest FROM versions WHERE name = ? AND digest = ? ORDER BY version DESC LIMIT 1", (name, digest)
    ).fetchone()
    return parse_stored(row[0]) if row else None


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


def insert_evaluation(connection: sqlite3.Connection, name: str, version: int, one: EvaluationRecord) -> None:
    """Put one value where lists and filters find it."""
    connection.execute(
        "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)",
        (name, version, one.metric, one.data, one.adapter_value, one.base_value),
    )


def evaluations_of(connection: sqlite3.Connection, manifest: AdapterManifest) -> tuple[EvaluationRecord, ...]:
    """Everything measured of a version, by its maker or here later, by metric and data."""
    rows = connection.execute(
        "SELECT metric, data, adapter_value, base_value FROM metrics WHERE name = ? AND version = ?"
        " ORDER BY metric, data",
        (manifest.name, manifest.version),
    )
    return tuple(
        EvaluationRecord(metric=metric, data=data, adapter_value=ours, base_value=base)
        for metric, data, ours, base in rows
    )


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


def make_folder(folder: Path) -> None:
    """Make `folder` and whatever is missing above it; again is no error."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: written aside, fsynced, renamed, the folder fsynced."""
    make_folder(path.parent)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
