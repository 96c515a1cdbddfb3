"""A registry in one file, written while it is used, and back into an empty home.

The file is a tar archive. Its first member, `backup.json`, promises every other one by sha256 and size:

```
backup.json
journal.jsonl  trust.json               as they were at one instant, with
manifests/NAME/N.json, .sig             every version that was visible then
objects/sha256/ab/cdef...               their contents
keys/NAME.pem                           private signing keys, only if asked for
```

The database is left out: a restore makes it again from manifests and journal, as `doctor --rebuild` does. Bases and
training runs are left out too.
"""

import contextlib
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.manifest import FileRecord
from adapterhub_lite.adapter_format.strict_reading import StrictModel, strict_json
from adapterhub_lite.errors import IntegrityError, UsageError
from adapterhub_lite.registry.operations.rebuild import rebuild_database
from adapterhub_lite.registry.store.database import DATABASE_FILE, fsync_folder, make_folder, parse_stored
from adapterhub_lite.registry.store.journal import JOURNAL_FILE
from adapterhub_lite.registry.store.store import TRUST_FILE, Store

INDEX = "backup.json"
MOST_INDEX_BYTES = 256 << 20
BLOCK_BYTES = 1 << 20
NAMES = re.compile(
    r"journal\.jsonl|trust\.json|keys/[A-Za-z0-9][\w.-]{0,63}\.pem"
    r"|manifests/[A-Za-z0-9][\w.-]{0,63}/[1-9]\d{0,18}\.(json|sig)|objects/sha256/[0-9a-f]{2}/[0-9a-f]{62}"
)


class BackupIndex(StrictModel):
    """What a backup holds: file under the home -> its sha256 and size."""

    schema_version: Literal[1] = 1
    created: str
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @property
    def versions(self) -> int:
        """How many versions it holds."""
        return sum(name.startswith("manifests/") and name.endswith(".json") for name in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


@dataclass
class _Snapshot:
    """What was visible at one instant: small files by their content, objects by their record."""

    contents: dict[str, bytes]
    objects: dict[str, FileRecord]


def write_backup(store: Store, target: Path, *, keys: bool = False) -> BackupIndex:
    """Write all versions, aliases, history and signatures into the new file `target`, and read it back to verify it.

    Others may add, move and serve meanwhile; collections wait. `keys` also takes the private signing keys.

    Raises:
        UsageError: `target` is there already, or there is nothing to save.
        IntegrityError: an object is not what its manifest says.
    """
    check_target(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with store.lock(exclusive=False):
            snapshot = _snapshot(store, keys)
            index = BackupIndex(
                created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                files={**{name: _record(content) for name, content in snapshot.contents.items()}, **snapshot.objects},
            )
            _write(store, aside, index, snapshot)
        check_backup(aside)
        aside.rename(target)
        fsync_folder(target.parent)
    finally:
        aside.unlink(missing_ok=True)
    return index


def check_target(target: Path) -> None:
    """Raise UsageError where a backup cannot be written to `target`: something is there, or no folder for it."""
    if target.exists():
        raise UsageError(f"{target} is there already; give another path.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {str(target.parent)!r} to write the backup into.")


def check_backup(source: Path) -> BackupIndex:
    """Read a backup whole and compare every byte with its index; nothing is written.

    Raises:
        IntegrityError: it is no backup, is cut off, or differs from its index.
    """
    with _opened(source) as archive:
        index = _read_index(archive, source)
        for _, record, file in _members(archive, index, source):
            _copy(file, None, record, source)
    return index


def restore_backup(store: Store, source: Path) -> BackupIndex:
    """Bring a backup into a home without a registry; every byte is verified before any version is visible.

    Raises:
        UsageError: the home has a registry.
        IntegrityError: the backup is damaged; the home has no version then.
    """
    index = check_backup(source)
    with store.lock(exclusive=True):
        if (store.home / DATABASE_FILE).exists() or any((store.home / "manifests").glob("*/*")):
            raise UsageError(f"{store.home} has a registry already. Restore into an empty home, with --home.")
        aside = store.home / ".restore"
        with _opened(source) as archive:
            for name, record, file in _members(archive, _read_index(archive, source), source):
                # Manifests make a version visible: they come last, in one step.
                path = (aside if name.startswith("manifests/") else store.home) / name
                make_folder(path.parent)
                path.unlink(missing_ok=True)
                _place(file, path, record, source)
        if (aside / "manifests").exists():
            for folder in [*(aside / "manifests").iterdir(), aside / "manifests"]:
                fsync_folder(folder)
            with contextlib.suppress(FileNotFoundError):
                (store.home / "manifests").rmdir()
            (aside / "manifests").rename(store.home / "manifests")
            aside.rmdir()
        fsync_folder(store.home)
    report = rebuild_database(store)
    if report.skipped:
        raise IntegrityError(f"The backup {source} was restored, without: {'; '.join(report.skipped)}.")
    return index


def _snapshot(store: Store, keys: bool) -> _Snapshot:
    """All small files as they are between two writes: every act holds the database's write lock to its end."""
    found = _Snapshot({}, {})
    with store.write(locked=True) as connection:
        rows = connection.execute("SELECT name, version, manifest, signature FROM versions ORDER BY name, version")
        for name, version, content, signature in rows.fetchall():
            found.contents[f"manifests/{name}/{version}.json"] = content
            if signature is not None:
                found.contents[f"manifests/{name}/{version}.sig"] = signature
            for record in parse_stored(content).files.values():
                found.objects[f"objects/sha256/{record.sha256[:2]}/{record.sha256[2:]}"] = record
        if not found.contents:
            raise UsageError(f"There is nothing in {store.home} to save: it has no adapters.")
        private = sorted((store.home / "keys").glob("*.pem")) if keys else []
        for path in (store.home / JOURNAL_FILE, store.home / TRUST_FILE, *private):
            if path.exists():
                found.contents[path.relative_to(store.home).as_posix()] = path.read_bytes()
    return found


def _write(store: Store, path: Path, index: BackupIndex, snapshot: _Snapshot) -> None:
    # It may hold keys, and manifests say who trained on what: its owner reads it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        os.fdopen(descriptor, "wb") as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, INDEX, io.BytesIO(index.model_dump_json().encode()))
        for name, content in snapshot.contents.items():
            _add(archive, name, io.BytesIO(content))
        for name, record in snapshot.objects.items():
            try:
                with store.objects.path(record.sha256).open("rb") as content_file:
                    _add(archive, name, content_file)
            except FileNotFoundError as error:
                raise IntegrityError(
                    f"{name} is missing in {store.home}: `adapterhub-lite doctor` says whose."
                ) from error
        archive.close()
        file.flush()
        os.fsync(file.fileno())


def _add(archive: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = file.seek(0, os.SEEK_END), 0o600
    file.seek(0)
    archive.addfile(info, file)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tarfile.TarFile]:
    if not source.is_file():
        raise UsageError(f"There is no backup {str(source)!r}.")
    try:
        with tarfile.open(source, mode="r|") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"{source} is no backup, or was cut off: {error}.") from error


def _read_index(archive: tarfile.TarFile, source: Path) -> BackupIndex:
    first = archive.next()
    if first is None or first.name != INDEX or not first.isreg() or first.size > MOST_INDEX_BYTES:
        raise IntegrityError(f"{source} is no backup: it does not begin with {INDEX}.")
    file = archive.extractfile(first)
    assert file is not None, "a regular file has content"
    try:
        strict_json(content := file.read(), what=INDEX, limit=MOST_INDEX_BYTES)
        index = BackupIndex.model_validate_json(content)
    except (ValueError, ValidationError) as error:
        raise IntegrityError(f"{source} is no backup of this version: {str(error)[:200]}") from error
    strange = [name for name in index.files if not NAMES.fullmatch(name)]
    if strange:
        raise IntegrityError(f"{source} names a file that no registry has: {strange[0]!r:.80}.")
    return index


def _members(archive: tarfile.TarFile, index: BackupIndex, source: Path) -> Iterator[tuple[str, FileRecord, IO[bytes]]]:
    """Every file after the index, in the order of the archive; all that are promised, and no other."""
    waiting = dict(index.files)
    while (member := archive.next()) is not None:
        record = waiting.pop(member.name, None)
        if record is None or not member.isreg() or member.size != record.size:
            raise IntegrityError(f"{source} holds {member.name!r:.80}, which its index does not promise so.")
        file = archive.extractfile(member)
        assert file is not None, "a regular file has content"
        yield member.name, record, file
    if waiting:
        raise IntegrityError(f"{source} was cut off: {len(waiting)} files are missing, such as {next(iter(waiting))}.")


def _place(file: IO[bytes], path: Path, record: FileRecord, source: Path) -> None:
    mode = 0o444 if "objects" in path.parts else 0o600
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        _copy(file, out, record, source)
        out.flush()
        os.fsync(out.fileno())


def _copy(file: IO[bytes], out: IO[bytes] | None, record: FileRecord, source: Path) -> None:
    """Read a member to its end, into `out` if given, and compare it with what was promised."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
        if out is not None:
            out.write(block)
    if digest.hexdigest() != record.sha256:
        raise IntegrityError(f"A file in {source} has other bytes than promised (sha256 {record.sha256:.16}...).")


def _record(content: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
