"""The SQLite database of names, versions and aliases: schema, connections, transactions. Knows no adapter files.

Write-ahead logging with synchronous=FULL: readers never wait, and what COMMIT has acknowledged is on disk.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from adapterhub_lite.errors import RegistryError, SchemaVersionError, UnknownNameError
from adapterhub_lite.registry.store.durable import fsync_folder, make_folder
from adapterhub_lite.registry.store.locks import store_lock

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
    def write(self, *, locked: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer runs beside; rolled back when the block raises.

        `locked` says that the caller holds the store's lock; a rebuild never replaces the database under a writer.
        """
        with nullcontext() if locked else store_lock(self.path.parent, exclusive=False):
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
