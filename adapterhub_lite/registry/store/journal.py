"""What the manifests cannot say (aliases, pins, removals, later evaluations) as lines of JSON, from which the database can be rebuilt.

A line is on disk before the database commits it. An entry that never committed is superseded by the next one with the
same number, at the latest when a collection settles it.
"""

import json
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from adapterhub_lite.adapter_format.manifest import EvaluationRecord
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.registry.store.database import fsync_folder

JOURNAL_FILE = "journal.jsonl"


class JournalEntry(StrictModel):
    """One act. `number` counts up in the database; `at` is UTC, ISO 8601."""

    number: int
    act: Literal["set", "rollback", "drop", "pin", "unpin", "remove", "restore", "evaluate"]
    name: str
    alias: str | None = None
    version: int | None = None
    previous: int | None = None
    digest: str | None = None
    evaluation: EvaluationRecord | None = None
    at: str


def record_act(connection: sqlite3.Connection, home: Path, **act: object) -> None:
    """Put one act into the journal: the line first, then the row that the caller's transaction commits."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = JournalEntry.model_validate({"number": _committed(connection) + 1, "at": now, **act})
    _append(home, entry)
    insert_entry(connection, entry)


def settle_journal(connection: sqlite3.Connection, home: Path) -> None:
    """Let the lines of acts count for nothing whose process died before it committed: a rebuild would take them for done.

    Call it in a transaction that writes. The last act that committed is written once more, which supersedes what follows.
    """
    committed = _committed(connection)
    entries = read_journal(home)
    if not entries or entries[-1].number <= committed:
        return
    kept = [entry for entry in entries if entry.number <= committed]
    if kept:
        _append(home, kept[-1])
    else:
        os.truncate(home / JOURNAL_FILE, 0)


def _committed(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'journal'").fetchone()
    return int(row[0]) if row else 0


def _append(home: Path, entry: JournalEntry) -> None:
    line = json.dumps(entry.model_dump(mode="json", exclude_none=True), sort_keys=True).encode() + b"\n"
    # The caller holds the database's write lock, so nobody else appends.
    with (home / JOURNAL_FILE).open("ab+") as file:
        if not file.tell():
            fsync_folder(home)
        else:
            file.seek(-1, os.SEEK_END)
            # A crash may have cut the last line; it must not swallow this one.
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def insert_entry(connection: sqlite3.Connection, entry: JournalEntry) -> None:
    """Put an act that is in the journal's file into the database, which keeps evaluations in a table of its own."""
    values = entry.model_dump(exclude={"evaluation"})
    columns = ", ".join(values)
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO journal ({columns}) VALUES ({marks})", list(values.values()))  # noqa: S608


def read_journal(home: Path) -> list[JournalEntry]:
    """Every act that counts, in order; a line that a crash cut off is left out."""
    path = home / JOURNAL_FILE
    entries: list[JournalEntry] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            found = JournalEntry.model_validate_json(line)
        except ValidationError:
            continue
        # A number again, or a lower one: what stands there was never committed.
        while entries and entries[-1].number >= found.number:
            entries.pop()
        entries.append(found)
    return entries
