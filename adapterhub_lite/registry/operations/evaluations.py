"""What was measured of a version after it was made: kept beside its manifest, which never changes.

A manifest is written once: digest, signature and what others pulled depend on its bytes. So a later evaluation is an
act in the journal and a row of the database; the same metric on the same data again replaces the earlier value.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import AdapterManifest, EvaluationRecord
from adapterhub_lite.registry.operations.aliases import record_act


def record_evaluations(
    connection: sqlite3.Connection, home: Path, manifest: AdapterManifest, measured: Sequence[EvaluationRecord]
) -> None:
    """Keep what was measured; part of the caller's transaction."""
    for one in measured:
        record_act(
            connection, home, act="evaluate", name=manifest.name, version=manifest.version, evaluation=one.model_dump()
        )
        insert_evaluation(connection, manifest.name, manifest.version, one)


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
