"""The store: everything that lies under one home folder, and the few steps that all operations share.

```
home/objects/sha256/ab/cdef...     file contents, immutable, shared between versions
home/manifests/NAME/N.json, .sig   what each version is, and who signed it
home/journal.jsonl                 aliases, pins, removals, later evaluations
home/registry.db                   the database, which can be rebuilt from those two
home/trust.json  keys/             whose signatures count; own signing keys
home/staging/  hub/  leases/       adapters on their way in, pulls under way, what servers hold
```

An operation is a function of a `Store`. A version becomes visible in one step: its objects are in place, its manifest
is the last file written, and the COMMIT of the database is the moment.

The law of `objects/`: a file at its final name is complete and on disk.
"""

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.manifest import (
    MAX_VERSION,
    AdapterManifest,
    AdapterReference,
    FileRecord,
    HexDigest,
    name_problem,
)
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import IntegrityError, RegistryError, ResourceError, UnknownNameError, UsageError
from adapterhub_lite.files import claim, lock_file
from adapterhub_lite.registry.store.database import (
    Database,
    find_manifest,
    fsync_folder,
    insert_version,
    make_folder,
    stored_version,
    write_durably,
)
from adapterhub_lite.registry.store.journal import record_act

BLOCK_BYTES = 1 << 20
# Neither a link nor a pipe is opened, where the system can refuse them.
PLAIN_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class ObjectStore:
    """`objects/` under a home folder: immutable contents, shared between versions."""

    def __init__(self, home: Path) -> None:
        self.root = home / "objects" / "sha256"

    def path(self, sha256: str) -> Path:
        """Where the content with this sha256 (64 hex digits) lies, whether it is there or not."""
        return self.root / sha256[:2] / sha256[2:]

    def adopt(self, path: Path) -> FileRecord:
        """Move the staged file at `path` to its final name, over a damaged one if need be; returns its record."""
        with path.open("r+b") as file:  # Windows flushes only what may be written to
            os.fsync(file.fileno())
        record = file_record(path)
        target = self.path(record.sha256)
        if target.exists() and file_record(target) == record:
            path.unlink()
            return record
        make_folder(target.parent)
        path.chmod(0o444)
        path.replace(target)
        fsync_folder(target.parent)
        return record

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        """Every object: sha256 by its name, and its path."""
        for folder in sorted(self.root.glob("??")):
            for path in sorted(folder.iterdir()):
                yield folder.name + path.name, path


def stage_file(source: Path, target: Path, *, limit: int) -> None:
    """Copy `source`, a plain file of at most `limit` bytes; a link put there meanwhile is not followed."""
    descriptor = os.open(source, os.O_RDONLY | PLAIN_FILE)
    with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
        remaining = limit
        while block := reader.read(min(BLOCK_BYTES, remaining)):
            writer.write(block)
            remaining -= len(block)


def file_record(path: Path) -> FileRecord:
    """The sha256 and size of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(sha256=digest, size=path.stat().st_size)


# Where pulls put what they fetch, one folder each, until it is complete; and the file whose lock a pull into a folder
# holds: that folder's name and this.
PULLS = "hub"
PULL_LOCK = ".lock"
LOCK_SECONDS = 60.0
TRUST_FILE = "trust.json"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


class TrustPolicy(StrictModel):
    """The content of `trust.json`: whose signatures count (name -> public key), and whether one is required."""

    schema_version: Literal[1] = 1
    required: bool = False
    keys: dict[str, HexDigest] = Field(default_factory=dict)


class Store:
    """What lies under `home`. One instance serves any number of threads."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.objects = ObjectStore(home)
        self.database = Database(home)

    @property
    def trust(self) -> TrustPolicy:
        """The policy now: by default nobody is trusted and nothing required.

        Raises:
            UsageError: the file is damaged; guessing a policy would be worse than stopping.
        """
        path = self.home / TRUST_FILE
        try:
            return TrustPolicy.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return TrustPolicy()
        except ValidationError as error:
            raise UsageError(f"{path} is not a trust policy. Mend it, or remove it to trust nobody.") from error

    @contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Hold the store: shared by those who add or move, exclusive for the one who collects or rebuilds.

        Not re-entrant: a thread that holds it exclusively and asks again waits for itself.

        Raises:
            RegistryError: it was not free within a minute.
        """
        make_folder(self.home)
        with ExitStack() as held:
            try:
                held.enter_context(lock_file(self.home / "store.lock", exclusive=exclusive, seconds=LOCK_SECONDS))
            except TimeoutError:
                raise RegistryError(
                    f"Other processes kept {self.home} busy for {LOCK_SECONDS:g} s. Try again."
                ) from None
            yield

    def hold(self, manifest: AdapterManifest) -> "Lease":
        """Keep a version from being collected while it is in use; release the lease, or leave its `with` block.

        Raises:
            UnknownNameError: it is not there any more.
        """
        # In a read-only home nobody collects, and no lock can be taken.
        writable = os.access(self.home, os.W_OK)
        with self.lock(exclusive=False) if writable else nullcontext():
            there = stored_version(self.read(), manifest.name, manifest.version)
            if there is None:
                raise UnknownNameError(f"{manifest.reference} is not here any more.")
            return Lease(self.home, there.digest)

    def read(self) -> sqlite3.Connection:
        """A connection to read from."""
        return self.database.read()

    @contextmanager
    def write(self, *, locked: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction; rolled back when the block raises. `locked`: the caller holds the store's lock."""
        with nullcontext() if locked else self.lock(exclusive=False), self.database.write() as connection:
            yield connection

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder on the disk of the objects, gone at the end; collection waits for it."""
        with self.lock(exclusive=False):
            root = self.home / "staging"
            root.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=root))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def resolve(self, reference: str | AdapterReference) -> AdapterManifest:
        """The manifest that `name` (newest), `name:3`, `name@alias` or a digest names now.

        Raises:
            UnknownNameError: there is none.
            ReferenceSyntaxError: not a reference.
        """
        return find_manifest(self.read(), AdapterReference.parse(reference))

    def file(self, manifest: AdapterManifest, filename: str, *, verify: bool = False) -> Path:
        """The immutable local file `filename` of a version; read it, never write to it.

        With `verify` every byte is compared, as whatever hands a version on has to: a disk may rot.

        Raises:
            UnknownNameError: the version has no such file.
            IntegrityError: it is not there, or has another size (with `verify`: other bytes).
        """
        record = manifest.files.get(filename)
        if record is None:
            raise UnknownNameError.among(f"file of {manifest.reference}", filename, sorted(manifest.files))
        path = self.objects.path(record.sha256)
        sound = path.is_file() and path.stat().st_size == record.size
        if not sound or (verify and file_record(path) != record):
            raise IntegrityError(
                f"{filename} of {manifest.reference} is missing or damaged in {self.home}. Pull it again, or add it "
                "again from where it came."
            )
        return path

    def manifest_path(self, name: str, version: int) -> Path:
        """Where the manifest of a version lies as a file; its signature lies beside it as `.sig`."""
        return self.home / "manifests" / name / f"{version}.json"

    def check_new_name(self, connection: sqlite3.Connection, name: str) -> None:
        """Raise unless a version may be called `name` here: a new name that can be told from every other one.

        Raises:
            UsageError: it is no name, is reserved, or differs from another name only by case.
        """
        known = connection.execute("SELECT name FROM names WHERE name = ? COLLATE NOCASE", [name]).fetchall()
        if (name,) in known:
            return
        if problem := name_problem(name):
            raise UsageError(problem)
        if known:
            raise UsageError(
                f"There is an adapter {known[0][0]!r} here, from which {name!r} differs only by case. "
                "Use that name, or one that cannot be mistaken for it."
            )

    def next_version(self, connection: sqlite3.Connection, name: str) -> int:
        """The number after the highest that `name` ever had.

        Raises:
            RegistryError: it has none left.
        """
        row = connection.execute("SELECT last_version FROM names WHERE name = ?", [name]).fetchone()
        last = row[0] if row else 0
        if last >= MAX_VERSION:
            raise RegistryError(f"{name!r} has used up its version numbers (up to {MAX_VERSION}). Use another name.")
        return int(last) + 1

    def publish(
        self, connection: sqlite3.Connection, manifest: AdapterManifest, signature: bytes | None = None
    ) -> None:
        """Make a version visible, once the caller commits; its objects are in place.

        Raises:
            RegistryError: the number belongs, or once belonged, to another adapter.
            UsageError: the name may not be used here.
        """
        key = (manifest.name, manifest.version)
        self.check_new_name(connection, manifest.name)
        for table, state in (("versions", "is"), ("removed", "was")):
            row = connection.execute(f"SELECT digest FROM {table} WHERE name = ? AND version = ?", key).fetchone()  # noqa: S608
            if row and (state == "is" or row[0] != manifest.digest):
                raise RegistryError(
                    f"{manifest.reference} {state} another adapter here ({row[0]:.19}..., not {manifest.digest:.19}...). "
                    "Take it in under another name."
                )
            if row:
                # Otherwise a rebuild would take the removal in the journal for the last word.
                record_act(connection, self.home, act="restore", name=manifest.name, version=manifest.version)
        path = self.manifest_path(*key)
        if signature is not None:
            write_durably(path.with_suffix(".sig"), signature)
        write_durably(path, manifest.to_bytes())
        insert_version(connection, manifest, signature)

    @contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """A block in which errors of the machine become one sentence about `doing`; see `machine_errors`."""
        with machine_errors(doing, self.home):
            yield


class Lease:
    """The statement of a process that it uses an adapter: a server serves it, a push uploads it.

    It ends with `release`, with its `with` block, with the last reference to it, or with the process. `effective` is
    False in a read-only home, where no lease can be written, nor anything be collected.
    """

    def __init__(self, home: Path, digest: str) -> None:
        self._file: IO[str] | None = None
        self._release: Callable[[], None] | None = None
        self._owner = os.getpid()
        folder = home / "leases"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / f"{uuid.uuid4().hex}.json"
            self._file = self._path.open("x")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return
        self._release = claim(self._file, wait=True)  # another may just look whether it is held
        json.dump({"digest": digest, "process": os.getpid()}, self._file)
        self._file.flush()

    @property
    def effective(self) -> bool:
        """Whether the lease holds anything now."""
        return self._file is not None

    def release(self) -> None:
        """End the lease; again is no error."""
        if self._file is not None:
            # A process forked from the owner has this object too, but may not end the lease.
            if self._owner == os.getpid():
                self._path.unlink(missing_ok=True)
            (self._release or self._file.close)()
            self._file = None

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def leased_digests(home: Path, *, clear: bool = False) -> set[str]:
    """The digests that living processes hold.

    With `clear`, for which the caller must hold the store exclusively, leases of dead processes are deleted.
    """
    held: set[str] = set()
    for path in (home / "leases").glob("*.json"):
        try:
            with path.open("r+") as file:
                release = claim(file)
                if release is None:
                    held.add(json.load(file)["digest"])
                    continue
                if clear:
                    path.unlink(missing_ok=True)
                release()
        except (FileNotFoundError, ValueError):
            # Just released, or just being written by one who holds the store.
            continue
    return held


@contextmanager
def machine_errors(doing: str, home: Path) -> Iterator[None]:
    """Turn errors of the machine inside the block into one sentence about `doing` (as in "add 'sql'").

    Raises:
        ResourceError: the disk is full, the folder read-only, or it cannot be read.
        RegistryError: another process held the store for longer than the time-out, or the database is damaged.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(_os_text(error, doing, home)) from error
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text:
            raise ResourceError(_os_text(OSError(errno.ENOSPC, ""), doing, home)) from error
        if "readonly" in text or "unable to open" in text:
            raise ResourceError(_os_text(OSError(errno.EROFS, ""), doing, home)) from error
        if "disk I/O" in text:
            raise ResourceError(f"Could not {doing}: the disk under {home} fails or is full ({text}).") from error
        if "locked" in text or "busy" in text:
            raise RegistryError(
                f"Could not {doing}: another process holds the registry in {home}. Try again."
            ) from error
        raise RegistryError(
            f"Could not {doing}: the database in {home} is damaged ({text}). Run `adapterhub-lite doctor --rebuild`."
        ) from error


def _os_text(error: OSError, doing: str, home: Path) -> str:
    if error.errno in FULL:
        return f"Could not {doing}: the disk under {home} is full. Nothing was changed; free some space and try again."
    if error.errno in FORBIDDEN:
        return f"Could not {doing}: {home} cannot be written to. Set ADAPTERHUB_HOME to a folder of your own."
    where = f" ({Path(str(error.filename)).name})" if error.filename else ""
    return f"Could not {doing} in {home}: {error.strerror or error}{where}."
