"""Pulling from a hub with proof: every byte is compared with the manifest before it counts. The wire is `hub_client`.

The revision becomes a 40-hex commit first, from the hub and never from a cache; only names that an adapter may have
are fetched, by that commit, into a folder of our own; the registry takes them in or refuses them.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from adapterhub_lite.adapter_format.added_tokens import ADDED_TOKENS_FILE, TOKENIZER_FILE
from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES
from adapterhub_lite.adapter_format.foreign.opening import ARCHIVED_SIZES, may_bring_tokens
from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    OriginRecord,
    is_alias,
    read_manifest,
)
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import (
    AdapterRejectedError,
    HubUnreachableError,
    IntegrityError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry.hub.client import HubRepo, RemoteFile, aliases_at
from adapterhub_lite.registry.hub.receipts import Progress, PullReceipt
from adapterhub_lite.registry.operations.aliases import move_alias
from adapterhub_lite.registry.operations.intake import About, Reading, add_adapter, import_adapter
from adapterhub_lite.registry.operations.lock import Lock, LockedAdapter, adapter_problems
from adapterhub_lite.registry.operations.sign import check_trusted, distrusted
from adapterhub_lite.registry.store.database import make_folder, parse_stored, stored_digest, write_durably
from adapterhub_lite.registry.store.store import PULL_LOCK, PULLS, Store

SUBFOLDER = re.compile(r"(?!\.)[\w.-]{1,100}(/(?!\.)[\w.-]{1,100}){0,8}")
# A commit, a tag, a branch (with slashes), or refs/pr/N; the same in each part as in a name.
REVISION = re.compile(r"[A-Za-z0-9][\w.\-]{0,63}(?:/[A-Za-z0-9][\w.\-]{0,63}){0,7}")
MOST_ALIASES = 20
Listing = dict[str, RemoteFile]


@dataclass(frozen=True)
class _Pull:
    """What is asked for, and where it comes to lie."""

    store: Store
    repo: HubRepo
    revision: str | None
    name: str
    named: bool
    alias: str | None
    base: ResolvedBase | None
    verify: Literal["files", "probes"]
    adopt: bool
    expected: LockedAdapter | None
    tell: Progress
    subfolder: str | None = None

    @property
    def memo(self) -> Path:
        """The file that remembers what this request came to, for pulling it again offline."""
        parts = [self.repo.endpoint, self.repo.id, self.revision, self.name if self.named else None]
        asked = json.dumps([*parts, *filter(None, [self.subfolder])])
        return self.store.home / PULLS / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"


def check_request(revision: str | None, subfolder: str | None, adopt: bool, alias: str | None) -> None:
    """Raise UsageError for what can be no revision, folder or alias, before a hub is asked."""
    plain = (revision or "").removeprefix("@")
    if revision is not None and not (REVISION.fullmatch(plain) and (plain == revision or is_alias(plain))):
        raise UsageError(f"Wanted a revision like v3, @prod, a branch or a 40-hex commit; got {revision!r:.80}.")
    if subfolder is not None and not (adopt and SUBFOLDER.fullmatch(subfolder)):
        raise UsageError(f"Wanted the folder of an adapter to adopt, such as 'checkpoint-100'; got {subfolder!r:.80}.")
    if alias is not None and not is_alias(alias):
        raise UsageError(f"Wanted an alias of letters, digits, '.', '_', '-', not all digits; got {alias!r:.80}.")


def pull_adapter(
    store: Store,
    repo_id: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    alias: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    offline: bool = False,
    adopt: bool = False,
    base: ResolvedBase | None = None,
    verify: Literal["files", "probes"] = "files",
    progress: Progress | None = None,
    expected: LockedAdapter | None = None,
    subfolder: str | None = None,
) -> PullReceipt:
    """Bring a published version into the registry as the next version of `name`, verified.

    Names are local: `name` None is the repository's, where no adapter from elsewhere has it; what the publisher calls
    the adapter, its version and its aliases are kept as facts (`manifest.origin`) and decide nothing. What `name` has
    already is not taken in twice. `alias` is pointed at what came, here.

    `revision` is a tag (`v3`), a full commit, a branch, `refs/pr/N`, or `@alias` of the hub; None takes the highest
    version. `adopt` takes a repository that plain PEFT made, measured on `base`, in its
    `subfolder` where it is not at the top.
    `offline` answers from what was pulled before, without asking the hub. `verify="probes"` also loads the base and
    replays the recorded behaviour (or, adopting, records it). `expected` is what a lock says of it. A failed pull can
    be repeated: files that are complete are not fetched again.

    Raises:
        IntegrityError: bytes are not those of the manifest, twice in a row, or not those that were `expected`.
        AdapterRejectedError, BaseMismatchError, RegistryError: from taking it in, or the policy wants it signed.
        UsageError: no such name, alias or revision can be; or `name` was not given and is taken.
        HubPermissionError, HubUnreachableError, UnknownNameError: from the hub.
        ResourceError: the disk is full, or the home cannot be written to.
    """
    check_request(revision, subfolder, adopt, alias)
    repo, local = HubRepo(repo_id, endpoint=endpoint, token=token), name or repo_id.rpartition("/")[2]
    tell = progress or (lambda _: None)
    asked = _Pull(store, repo, revision, local, name is not None, alias, base, verify, adopt, expected, tell, subfolder)
    try:
        store.check_new_name(store.read(), local)
    except UsageError as error:
        raise error if name else UsageError(f"{error} Give name= (command line: --name).") from error
    if offline:
        found = _memo(asked)
        if found is None:
            raise HubUnreachableError(
                f"{repo.id} at {revision or 'its newest version'} was not pulled here, or what was pulled is gone or "
                "damaged. Pull it once online."
            )
        return _aliased(asked, _checked(asked, found))
    with store.guard(f"pull {repo_id}"):
        receipt = _aliased(asked, _pull(asked))
        manifest = receipt.manifest
        said = {"commit": receipt.commit, "reference": manifest.reference, "digest": manifest.digest}
        write_durably(asked.memo, json.dumps(said).encode())
    return receipt


def pull_locked(
    store: Store,
    lock: Lock,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    bases: Sequence[ResolvedBase] = (),
    progress: Progress | None = None,
) -> list[AdapterManifest]:
    """Bring here whatever of a lock is missing, from where the lock says, and nothing else; returns what came.

    What the hub has is compared with the lock before any of it is taken in; bases are looked for in the registry's
    home and among `bases`.

    Raises:
        UsageError: something is missing and the lock has no source for it.
        IntegrityError: the source now has another adapter under that version.
        AdapterRejectedError: the policy wants it signed, and it is not, also where it is here already.
    """
    came = []
    for locked in lock.adapters:
        problems = adapter_problems(store, locked)
        if not problems:
            continue
        if locked.source is None:
            raise UsageError(f"{locked.reference}: {problems[0]}; the lock does not say where to pull it from.")
        base = next((base for base in bases if base.fingerprint == locked.base.fingerprint), None)
        receipt = pull_adapter(
            store, locked.source, revision=locked.revision or f"v{locked.version}", name=locked.name, endpoint=endpoint, token=token,
            base=base, progress=progress, expected=locked,
        )  # fmt: skip
        came.append(receipt.manifest)
    return came


def _check_taken(asked: _Pull) -> None:
    """Raise where the name of a stranger's repository would add a newest version to an adapter of our own."""
    rows = asked.store.read().execute("SELECT manifest FROM versions WHERE name = ?", [asked.name]).fetchall()
    origins = {origin.repo_id if (origin := parse_stored(row[0]).origin) else None for row in rows}
    if rows and not asked.named and asked.repo.id not in origins:
        raise UsageError(
            f"There is an adapter {asked.name!r} here, which did not come from {asked.repo.id}. Give name= (command "
            f"line: --name): {asked.name!r} to make what is pulled its next version, or another name."
        )


def _aliased(asked: _Pull, receipt: PullReceipt) -> PullReceipt:
    if asked.alias is not None:
        manifest, home = receipt.manifest, asked.store.home
        with asked.store.write() as connection:
            move_alias(connection, home, manifest.name, asked.alias, manifest.version, None)
    return receipt


def _pull(asked: _Pull) -> PullReceipt:
    repo = asked.repo
    tag, sha = _pin(repo, asked.revision)
    asked.tell(f"{repo.id} is at {sha}")
    make_folder(asked.store.home / PULLS)
    label = hashlib.sha256(f"{repo.endpoint} {repo.id} {sha}".encode()).hexdigest()[:32]
    folder = asked.store.home / PULLS / label
    with FileLock(f"{folder}{PULL_LOCK}"):
        listed = repo.files(sha)
        if MANIFEST_FILE in listed:
            receipt = _pull_verified(asked, sha, tag, listed, folder)
        elif asked.adopt:
            receipt = _adopt(asked, sha, listed, folder)
        else:
            raise AdapterRejectedError(repo.id, [f"it has no {MANIFEST_FILE}; adopt=True measures and records it here"])
        shutil.rmtree(folder, ignore_errors=True)
    return receipt


def _pin(repo: HubRepo, revision: str | None) -> tuple[str | None, str]:
    """(tag or None, 40-hex commit) that the hub itself gives for `revision`."""
    if revision is not None and revision.startswith("@"):
        aliases = aliases_at(repo, repo.head())
        if revision[1:] not in aliases:
            raise UnknownNameError.among("alias", revision[1:], sorted(aliases))
        revision = f"v{aliases[revision[1:]]}"
    if revision is None:
        versions = [int(tag[1:]) for tag in repo.tags() if re.fullmatch(r"v[1-9]\d{0,8}", tag)]
        revision = f"v{max(versions)}" if versions else "main"
    tag = revision if re.fullmatch(r"v[1-9]\d{0,8}", revision) else None
    return tag, repo.head(revision)


def _pull_verified(asked: _Pull, sha: str, tag: str | None, listed: Listing, folder: Path) -> PullReceipt:
    """Fetch and take in; once more from nothing when the bytes are not what the manifest says."""
    for attempt in range(2):
        try:
            return _take_in(asked, sha, tag, listed, folder)
        except IntegrityError:
            shutil.rmtree(folder, ignore_errors=True)
            if attempt:
                raise
            asked.tell("the bytes do not match the manifest: fetching them once more")
            listed = asked.repo.files(sha)
    raise AssertionError("unreachable")


def _take_in(asked: _Pull, sha: str, tag: str | None, listed: Listing, folder: Path) -> PullReceipt:
    repo, expected = asked.repo, asked.expected
    manifest = read_manifest(_fetch(asked, sha, MANIFEST_FILE, listed, folder).read_bytes())
    if tag not in (None, f"v{manifest.version}"):
        raise IntegrityError(f"{repo.id} says {tag}, its manifest says v{manifest.version}. Do not trust it.")
    if expected is not None:
        _check_locked(repo, manifest, expected)
    here = _intact(asked.store, asked.name, manifest.digest)
    if here is not None and expected is not None and here.version != expected.version:
        here = None  # it is asked for by the version that the lock gives it
    # What the policy refuses as it is here may have been signed meanwhile.
    if here is not None and not (SIGNATURE_FILE in listed and distrusted(asked.store, here)):
        return _checked(asked, PullReceipt(here, sha, "store"))
    if here is None:
        _check_taken(asked)
    names = [*manifest.files, *({SIGNATURE_FILE} & set(listed))]
    _check_promise(manifest, {name: file.size for name, file in listed.items()})
    for name in names:
        _fetch(asked, sha, name, listed, folder)
    plain = folder / "adapter"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    # The client keeps its own notes in `folder`; the registry is shown the adapter's files alone.
    for name in [MANIFEST_FILE, *names]:
        (plain / name).hardlink_to(folder / name)
    origin = OriginRecord(repo_id=repo.id, commit=sha, aliases=_aliases_of(repo, manifest.version))
    taken = import_adapter(
        asked.store,
        plain,
        name=asked.name,
        version=expected.version if expected else None,
        origin=origin,
        expected=manifest,
        base=asked.base,
        verify=asked.verify,
    )
    return PullReceipt(taken, sha, "hub")


def _check_locked(repo: HubRepo, manifest: AdapterManifest, locked: LockedAdapter) -> None:
    same = {"digest": manifest.digest == locked.digest, "base": manifest.base.fingerprint == locked.base.fingerprint}
    for name in sorted({*manifest.files, *locked.files}):
        same[name] = manifest.files.get(name) == locked.files.get(name)
    if wrong := [what for what, equal in same.items() if not equal]:
        raise IntegrityError(
            f"{repo.id} has another adapter as v{manifest.version} than the lock: wanted {locked.digest}, got "
            f"{manifest.digest}, with another {', another '.join(wrong)}. Nothing was taken in."
        )


def _fetch(asked: _Pull, sha: str, name: str, listed: Listing, folder: Path, inside: str = "") -> Path:
    """One file of the adapter, of no more bytes than the hub lists, and no more than such a file may have."""
    size, most = listed[name].size, ARCHIVED_SIZES[name]
    if size > most:
        raise AdapterRejectedError(asked.repo.id, [f"{name} has {size} bytes, at most {most} are taken"])
    asked.tell(f"fetching {name}, {size} bytes")
    fetched = asked.repo.download(sha, inside + name, folder, size=size)
    if not listed[name].holds(fetched):
        raise IntegrityError(f"{name} of {asked.repo.id} did not arrive as the hub lists it. Pull again.")
    return fetched


def _aliases_of(repo: HubRepo, version: int) -> tuple[str, ...]:
    """The aliases that the hub points at a version now; none where its table is damaged: they are facts, no more."""
    try:
        found = aliases_at(repo, repo.head())
    except (IntegrityError, UnknownNameError):
        return ()
    return tuple(sorted(alias for alias, points in found.items() if points == version)[:MOST_ALIASES])


def _checked(asked: _Pull, receipt: PullReceipt) -> PullReceipt:
    """The receipt of a version that is here already, once the policy and, where asked for, its probes let it pass."""
    check_trusted(asked.store, receipt.manifest)
    if asked.verify == "probes":
        from adapterhub_lite.registry.operations.replay import check_stored

        check_stored(asked.store, receipt.manifest, base=asked.base)
    return receipt


def _intact(store: Store, name: str, digest: str) -> AdapterManifest | None:
    """The version with this digest as it is here, every byte compared; None where something is missing or damaged."""
    here = stored_digest(store.read(), name, digest)
    if here is None:
        return None
    try:
        for file in here.files:
            store.file(here, file, verify=True)
    except IntegrityError:
        return None
    return here


def _check_promise(manifest: AdapterManifest, sizes: dict[str, int]) -> None:
    """Refuse before the first byte of weights: odd names, files too large, sizes that are not the manifest's."""
    problems = [f"{name!r:.80} does not belong to an adapter" for name in manifest.files if name not in ALLOWED_SIZES]
    for name in set(manifest.files) & set(ALLOWED_SIZES):
        if sizes.get(name) != manifest.files[name].size:
            problems.append(
                f"{name} has {sizes.get(name, 0)} bytes on the hub, {manifest.files[name].size} were promised"
            )
    problems += [
        f"{name} has {size} bytes, at most {ALLOWED_SIZES[name]} are taken"
        for name, size in sizes.items()
        if size > ALLOWED_SIZES.get(name, size)
    ]
    if problems:
        raise AdapterRejectedError(manifest.reference, problems)


def _adopt(asked: _Pull, sha: str, listed: Listing, folder: Path) -> PullReceipt:
    repo, known = asked.repo, _memo(asked)
    if asked.store.trust.required:
        raise AdapterRejectedError(
            repo.id, ["it has no manifest, so nobody can have signed it, and the policy requires a trusted signature"]
        )
    if known is not None and known.commit == sha:
        return _checked(asked, PullReceipt(known.manifest, sha, "store"))
    _check_taken(asked)
    inside = f"{asked.subfolder}/" if asked.subfolder else ""
    listed = {name.removeprefix(inside): file for name, file in listed.items() if name.startswith(inside)}
    missing = [f"it has no {name}" for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in listed]
    if missing:
        raise AdapterRejectedError(repo.id, missing)
    plain = folder / "adapter"
    shutil.rmtree(plain, ignore_errors=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TEMPLATE_FILE, ADDED_TOKENS_FILE, TOKENIZER_FILE):
        if name not in listed or (name == TOKENIZER_FILE and not may_bring_tokens(plain)):
            continue  # without a template it was asked with the base's
        try:
            fetched = _fetch(asked, sha, name, listed, folder, inside)
        except IntegrityError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        plain.mkdir(exist_ok=True)
        (plain / name).hardlink_to(fetched)
    manifest = add_adapter(
        asked.store,
        plain,
        asked.name,
        base=asked.base,
        about=About(),
        verify=asked.verify,
        origin=OriginRecord(repo_id=repo.id, commit=sha),
        reading=Reading(tell=asked.tell),
    )
    return PullReceipt(manifest, sha, "hub")


def _memo(asked: _Pull) -> PullReceipt | None:
    """What an earlier pull of the same request came to, where that is still here, byte for byte."""
    if not asked.memo.exists():
        return None
    memo = json.loads(asked.memo.read_text())
    name, _, _ = memo["reference"].rpartition(":")
    manifest = _intact(asked.store, name, memo["digest"])
    return PullReceipt(manifest, memo["commit"], "offline") if manifest else None
