"""`adapters.lock`: which adapters, byte for byte, a project uses, and on which base; verifiable without a network."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from adapterhub_lite.adapter_format.manifest import AdapterManifest, Digest, FileRecord, HexDigest
from adapterhub_lite.adapter_format.record import BaseRecord, StrictModel
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import DataError, IntegrityError, SchemaVersionError, UnknownNameError, UsageError
from adapterhub_lite.registry.operations.importing import import_adapter
from adapterhub_lite.registry.operations.intake import find_base
from adapterhub_lite.registry.store.durable import write_durably
from adapterhub_lite.registry.store.objects import file_record

if TYPE_CHECKING:
    from adapterhub_lite.registry.registry import AdapterRegistry

LOCK_FILE = "adapters.lock"
LOCK_VERSION = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


class LockedBase(StrictModel):
    """The base of a locked adapter. `tokenizer` maps its tokenizer and template files to their sha256, where known."""

    id: str
    revision: str | None
    fingerprint: HexDigest
    tokenizer: dict[str, HexDigest]


class LockedAdapter(StrictModel):
    """One locked adapter. `source` says where to pull it from (repo id), None for one made here."""

    name: str
    version: int
    digest: Digest
    files: dict[str, FileRecord]
    base: LockedBase
    source: str | None = None

    @property
    def reference(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"


class Lock(StrictModel):
    """The content of `adapters.lock`."""

    schema_version: Literal[1] = 1
    adapters: tuple[LockedAdapter, ...]


def write_lock(
    registry: "AdapterRegistry",
    references: Sequence[str],
    path: str | Path = LOCK_FILE,
    *,
    sources: dict[str, str] | None = None,
    bases: Sequence[ResolvedBase] = (),
) -> Lock:
    """Pin each of `references` (newest and aliases as they are now) in the file at `path`; returns what it says.

    `sources` maps a name to the repository it is pulled from. The bases' tokenizers are read where the bases are in
    the registry's home or among `bases`.

    Raises:
        UnknownNameError: no such adapter.
        UsageError: nothing to lock.
    """
    if not references:
        raise UsageError("Wanted at least one adapter to lock, got none.")
    manifests = {m.reference: m for m in map(registry.resolve, references)}
    adapters = tuple(
        LockedAdapter(
            name=m.name, version=m.version, digest=m.digest, files=m.files, base=_locked_base(registry, m, bases),
            source=(sources or {}).get(m.name),
        )
        for _, m in sorted(manifests.items())
    )  # fmt: skip
    lock = Lock(adapters=adapters)
    content = json.dumps(lock.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_durably(Path(path).expanduser().absolute(), content.encode())
    return lock


def read_lock(path: str | Path = LOCK_FILE) -> Lock:
    """Read a lock.

    Raises:
        UsageError: there is none.
        DataError: it is not one.
        SchemaVersionError: a newer version of this project wrote it.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"There is no lock {str(path)!r}. Write one with `adapterhub-lite lock`.") from error
    try:
        return Lock.model_validate_json(content)
    except ValidationError as error:
        if _version(content) > LOCK_VERSION:
            raise SchemaVersionError(f"{path} was written by a newer version. Upgrade adapterhub-lite.") from error
        first = error.errors()[0]
        raise DataError(f"{path} is not a lock: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def verify_lock(registry: "AdapterRegistry", lock: Lock, *, bases: Sequence[ResolvedBase] = ()) -> list[str]:
    """Compare what is here with a lock, every byte, without a network; returns what is missing or different.

    Bases are looked for in the registry's home and among `bases`.
    """
    problems: list[str] = []
    for locked in lock.adapters:
        problems += [f"{locked.reference}: {problem}" for problem in _adapter_problems(registry, locked)]
        problems += [f"{locked.reference}: {problem}" for problem in _base_problems(registry, locked, bases)]
    return problems


def pull_locked(registry: "AdapterRegistry", lock: Lock, **options: Any) -> list[AdapterManifest]:
    """Bring here whatever of a lock is missing, from where the lock says, and nothing else; returns what came.

    What arrives is compared with the lock before this registry sees it. `options` go to `AdapterRegistry.pull`
    (endpoint, token, ...).

    Raises:
        UsageError: something is missing and the lock has no source for it.
        IntegrityError: the source now has another adapter under that version.
    """
    came = []
    for locked in lock.adapters:
        if not _adapter_problems(registry, locked):
            continue
        if locked.source is None:
            raise UsageError(f"{locked.reference} is not here, and the lock does not say where to pull it from.")
        with tempfile.TemporaryDirectory() as scratch:
            receipt = registry.__class__(scratch).pull(
                locked.source, revision=f"v{locked.version}", name=locked.name, **options
            )
            found: AdapterManifest = receipt.manifest
            if (found.digest, found.files) != (locked.digest, locked.files):
                raise IntegrityError(
                    f"{locked.source} has another adapter as v{locked.version} than the lock: wanted {locked.digest}, "
                    f"got {found.digest}. Nothing was taken in."
                )
            folder = registry.__class__(scratch).export(found.reference, Path(scratch) / "parcel")
            came.append(import_adapter(registry, folder, name=locked.name, expected=found))
    return came


def _adapter_problems(registry: "AdapterRegistry", locked: LockedAdapter) -> list[str]:
    try:
        manifest = registry.resolve(locked.digest)
    except UnknownNameError:
        return [f"the adapter {locked.digest} is not here; pull it with --locked"]
    problems = []
    for filename, promised in locked.files.items():
        try:
            found = file_record(registry.file(manifest, filename))
        except (IntegrityError, UnknownNameError) as error:
            problems.append(str(error))
            continue
        if found != promised:
            problems.append(f"{filename} has the sha256 {found.sha256:.16}..., locked is {promised.sha256:.16}...")
    return problems


def _base_problems(registry: "AdapterRegistry", locked: LockedAdapter, bases: Sequence[ResolvedBase]) -> list[str]:
    wanted = locked.base
    base = _find(registry, BaseRecord(id=wanted.id, revision=wanted.revision, fingerprint=wanted.fingerprint), bases)
    if base is None:
        return [f"the base {wanted.id} is not on this machine"]
    if base.fingerprint != wanted.fingerprint:
        return [
            f"the base {wanted.id} has the fingerprint {base.fingerprint:.16}..., locked is {wanted.fingerprint:.16}..."
        ]
    found = _tokenizer_digests(base)
    return [f"{name} of the base differs" for name, digest in wanted.tokenizer.items() if found.get(name) != digest]


def _find(registry: "AdapterRegistry", record: BaseRecord, bases: Sequence[ResolvedBase]) -> ResolvedBase | None:
    given = next((base for base in bases if record.id in (base.model_id, base.name)), None)
    return given or find_base(record, registry.home)


def _locked_base(registry: "AdapterRegistry", manifest: AdapterManifest, bases: Sequence[ResolvedBase]) -> LockedBase:
    base = _find(registry, manifest.base, bases)
    tokenizer = _tokenizer_digests(base) if base and base.fingerprint == manifest.base.fingerprint else {}
    record = manifest.base
    return LockedBase(id=record.id, revision=record.revision, fingerprint=record.fingerprint, tokenizer=tokenizer)


def _tokenizer_digests(base: ResolvedBase) -> dict[str, str]:
    present = [name for name in TOKENIZER_FILES if (base.folder / name).is_file()]
    return {name: file_record(base.folder / name).sha256 for name in present}


def _version(content: bytes) -> int:
    try:
        found: Any = json.loads(content)
        return int(found["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
