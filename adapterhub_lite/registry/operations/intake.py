"""The way in: a folder is copied aside, examined there, and becomes a version in one step or not at all.

What is examined is our own copy, so that nothing can change between the look and the keeping.
"""

import hashlib
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.lora_config import LoraConfigFile
from adapterhub_lite.adapter_format.manifest import AdapterManifest, FileRecord, canonical_json
from adapterhub_lite.adapter_format.record import BaseRecord
from adapterhub_lite.bases import EMBEDDED_BASES, ResolvedBase
from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry.check.folder import Inspection, inspect_adapter
from adapterhub_lite.registry.check.survey import ALLOWED_SIZES, survey_folder
from adapterhub_lite.registry.operations.aliases import record_act
from adapterhub_lite.registry.store.durable import write_durably
from adapterhub_lite.registry.store.objects import ObjectStore, stage_file
from adapterhub_lite.registry.store.rows import insert_version

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class StagedAdapter:
    """A copy of an adapter folder, on the registry's disk, with what was found in it."""

    folder: Path
    inspection: Inspection


def stage_adapter(
    folder: Path, staging: Path, *, base: ResolvedBase | None, subject: str | None = None
) -> StagedAdapter:
    """Copy what is allowed of `folder` into `staging` and examine the copy."""
    usable, problems = survey_folder(folder)
    for name in usable:
        try:
            stage_file(folder / name, staging / name, limit=ALLOWED_SIZES[name])
        except OSError as error:
            if (staging / name).exists():
                raise
            problems.append(f"{name} cannot be read: {error.strerror}")
    inspection = inspect_adapter(staging, base=base, subject=subject or f"The adapter in {folder.name!r:.100}")
    # The copy lacks what was refused at first sight: what was said of the folder itself counts.
    _, repeated = survey_folder(staging)
    inspection.problems = problems + [p for p in inspection.problems if p not in repeated]
    return StagedAdapter(staging, inspection)


def adapter_digest(config: LoraConfigFile, weights_sha256: str, base_fingerprint: str) -> str:
    """The identity of an adapter: over its weights, what decides in its configuration, and its base."""
    decided = {"weights": weights_sha256, "config": config.deciding(), "base": base_fingerprint}
    return "sha256:" + hashlib.sha256(canonical_json(decided)).hexdigest()


def keep_objects(objects: ObjectStore, staging: Path, names: list[str]) -> dict[str, FileRecord]:
    """Move staged files to their final, immutable place."""
    return {name: objects.adopt(staging / name) for name in sorted(names)}


def manifest_path(home: Path, name: str, version: int) -> Path:
    """Where the manifest of a version lies as a file: what the database can be made from again."""
    return home / "manifests" / name / f"{version}.json"


def publish(
    connection: sqlite3.Connection, home: Path, manifest: AdapterManifest, signature: bytes | None = None
) -> None:
    """Make a version visible; its objects are in place, its manifest is the last file, the caller's COMMIT the moment.

    Raises:
        RegistryError: the number belongs, or once belonged, to another adapter.
    """
    key = (manifest.name, manifest.version)
    for table, state in (("versions", "is"), ("removed", "was")):
        row = connection.execute(f"SELECT digest FROM {table} WHERE name = ? AND version = ?", key).fetchone()  # noqa: S608
        if row and (state == "is" or row[0] != manifest.digest):
            raise RegistryError(
                f"{manifest.reference} {state} another adapter here ({row[0]:.19}..., not {manifest.digest:.19}...). "
                "Take it in under another name."
            )
        if row:
            # Otherwise a rebuild would take the removal in the journal for the last word.
            record_act(connection, home, act="restore", name=manifest.name, version=manifest.version)
    path = manifest_path(home, *key)
    if signature is not None:
        write_durably(path.with_suffix(".sig"), signature)
    write_durably(path, manifest.to_bytes())
    insert_version(connection, manifest, signature)


def next_version(connection: sqlite3.Connection, name: str) -> int:
    """The number after the highest that `name` ever had."""
    row = connection.execute("SELECT last_version FROM names WHERE name = ?", [name]).fetchone()
    return (row[0] if row else 0) + 1


def is_commit(revision: str | None) -> bool:
    """Whether `revision` may pin a base: a 40-hex commit, or None for a local or embedded one."""
    return revision is None or COMMIT.fullmatch(revision) is not None


def find_base(record: BaseRecord, home: Path) -> ResolvedBase | None:
    """The base that a record names, where it already lies in this home; nothing is fetched."""
    for name, embedded in EMBEDDED_BASES.items():
        folder = home / "bases" / name
        if record.id in (name, embedded.base_model) and record.revision is None and (folder / "config.json").is_file():
            return ResolvedBase(name=name, model_id=embedded.base_model, folder=folder)
    if record.revision is None or not is_commit(record.revision) or not HUB_ID.fullmatch(record.id):
        return None
    cached = home / "bases" / "hub" / f"models--{record.id.replace('/', '--')}" / "snapshots" / record.revision
    if not (cached / "config.json").is_file():
        return None
    return ResolvedBase(name=record.id, model_id=record.id, folder=cached, revision=record.revision)
