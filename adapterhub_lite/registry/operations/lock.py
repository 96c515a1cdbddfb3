"""`adapters.lock`: which adapters, byte for byte, a project uses, and on which base; verifiable without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.manifest import (
    MAX_VERSION,
    AdapterManifest,
    BaseRecord,
    Digest,
    FileRecord,
    HexDigest,
)
from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.bases import ResolvedBase, find_base
from adapterhub_lite.errors import DataError, IntegrityError, SchemaVersionError, UnknownNameError, UsageError
from adapterhub_lite.registry.operations.sign import distrusted
from adapterhub_lite.registry.store.database import write_durably
from adapterhub_lite.registry.store.store import Store, file_record

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
    """One locked adapter. `source` says where to pull it from (repo id), None for one made here and nowhere else.

    `revision` is what it is called there; None: its version as a tag, as in a lock that does not say.
    """

    name: str
    version: int = Field(gt=0, le=MAX_VERSION)
    digest: Digest
    files: dict[str, FileRecord]
    base: LockedBase
    source: str | None = None
    revision: str | None = None

    @property
    def reference(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"


class Lock(StrictModel):
    """The content of `adapters.lock`."""

    schema_version: Literal[1] = 1
    adapters: tuple[LockedAdapter, ...]


def write_lock(
    store: Store,
    references: Sequence[str],
    path: str | Path = LOCK_FILE,
    *,
    sources: dict[str, str] | None = None,
    bases: Sequence[ResolvedBase] = (),
) -> Lock:
    """Pin each of `references` (newest and aliases as they are now) in the file at `path`; returns what it says.

    `sources` maps a name to the repository it is pulled from; what was pulled is pulled again from where it came
    when nothing else is said. The bases' tokenizers are read where the bases are in
    the registry's home or among `bases`.

    Raises:
        UnknownNameError: no such adapter.
        UsageError: nothing to lock.
    """
    if not references:
        raise UsageError("Wanted at least one adapter to lock, got none.")
    manifests = {m.reference: m for m in map(store.resolve, references)}
    adapters = []
    for _, m in sorted(manifests.items()):
        source, revision = _source(m, (sources or {}).get(m.name))
        base = _locked_base(store, m, bases)
        adapters.append(
            LockedAdapter(
                name=m.name, version=m.version, digest=m.digest, files=m.files, base=base, source=source,
                revision=revision,
            )
        )  # fmt: skip
    lock = Lock(adapters=tuple(adapters))
    content = json.dumps(lock.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_durably(Path(path).expanduser().absolute(), content.encode())
    return lock


def _source(manifest: AdapterManifest, given: str | None) -> tuple[str | None, str | None]:
    """(repository, revision) to pull a version from. What plain PEFT published has no manifest to compare with."""
    origin = manifest.origin
    if origin is not None and origin.version is not None and given in (None, origin.repo_id):
        # The commit and not the tag: it names the same bytes for ever.
        return origin.repo_id, origin.commit
    return given, f"v{manifest.version}" if given else None


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


def verify_lock(store: Store, lock: Lock, *, bases: Sequence[ResolvedBase] = ()) -> list[str]:
    """Compare what is here with a lock, every byte, without a network; returns what is missing or different.

    Bases are looked for in the registry's home and among `bases`.
    """
    problems: list[str] = []
    for locked in lock.adapters:
        problems += [f"{locked.reference}: {problem}" for problem in adapter_problems(store, locked)]
        problems += [f"{locked.reference}: {problem}" for problem in _base_problems(store, locked, bases)]
    return problems


def adapter_problems(store: Store, locked: LockedAdapter) -> list[str]:
    """What of a locked adapter is missing here or different, byte for byte, or refused by the policy of signatures."""
    try:
        # By the name that it is asked for: the same bytes under another one are not what would answer.
        manifest = store.resolve(locked.reference)
    except UnknownNameError:
        return [f"the adapter {locked.digest} is not here under that name; pull it with --locked"]
    if manifest.digest != locked.digest:
        return [f"it is {manifest.digest} here, locked is {locked.digest}"]
    refused = distrusted(store, manifest)
    problems = [refused] if refused else []
    for filename, promised in locked.files.items():
        try:
            found = file_record(store.file(manifest, filename))
        except (IntegrityError, UnknownNameError) as error:
            problems.append(str(error))
            continue
        if found != promised:
            problems.append(f"{filename} has the sha256 {found.sha256:.16}..., locked is {promised.sha256:.16}...")
    return problems


def _base_problems(store: Store, locked: LockedAdapter, bases: Sequence[ResolvedBase]) -> list[str]:
    wanted = locked.base
    base = _find(store, BaseRecord(id=wanted.id, revision=wanted.revision, fingerprint=wanted.fingerprint), bases)
    if base is None:
        return [f"the base {wanted.id} is not on this machine"]
    if base.fingerprint != wanted.fingerprint:
        return [
            f"the base {wanted.id} has the fingerprint {base.fingerprint:.16}..., locked is {wanted.fingerprint:.16}..."
        ]
    found = _tokenizer_digests(base)
    return [f"{name} of the base differs" for name, digest in wanted.tokenizer.items() if found.get(name) != digest]


def _find(store: Store, record: BaseRecord, bases: Sequence[ResolvedBase]) -> ResolvedBase | None:
    given = next((base for base in bases if record.id in (base.model_id, base.name)), None)
    return given or find_base(record, store.home)


def _locked_base(store: Store, manifest: AdapterManifest, bases: Sequence[ResolvedBase]) -> LockedBase:
    base = _find(store, manifest.base, bases)
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
