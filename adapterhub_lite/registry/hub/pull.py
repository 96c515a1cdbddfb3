"""Pulling from a hub with proof: every byte is compared with the manifest before it counts. The wire is `hub_client`.

The revision becomes a 40-hex commit first, from the hub and never from a cache; only names that an adapter may have
are fetched, by that commit, into a folder of our own; the registry takes them in or refuses them.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from adapterhub_lite.adapter_format.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
    AdapterManifest,
    read_manifest,
)
from adapterhub_lite.adapter_format.reference import is_alias
from adapterhub_lite.errors import (
    AdapterRejectedError,
    HubUnreachableError,
    IntegrityError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry.check.survey import ALLOWED_SIZES
from adapterhub_lite.registry.hub.aliases import aliases_at
from adapterhub_lite.registry.hub.client import HubRepo
from adapterhub_lite.registry.operations.importing import import_adapter
from adapterhub_lite.registry.store.durable import make_folder, write_durably
from adapterhub_lite.registry.store.locks import PULLS, pull_lock

if TYPE_CHECKING:
    from adapterhub_lite.bases import ResolvedBase
    from adapterhub_lite.registry.registry import AdapterRegistry

REVISION = re.compile(r"[0-9a-f]{40}|[A-Za-z0-9][\w.\-]{0,63}")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PullReceipt:
    """What a pull brought. `source`: "hub" (bytes fetched now), "store" (the hub named a digest that was here
    already) or "offline" (the hub was not asked, as wanted); `commit` is the 40-hex commit in each case."""

    manifest: AdapterManifest
    commit: str
    source: Literal["hub", "store", "offline"]


@dataclass(frozen=True)
class _Wish:
    """What to pull, and where the traces of it lie."""

    repo: HubRepo
    revision: str | None
    name: str | None
    folder: Path
    base: "ResolvedBase | None" = None
    verify: Literal["files", "probes"] = "files"

    @property
    def memo(self) -> Path:
        """The file that remembers what this wish came to, for pulling it again offline."""
        asked = json.dumps([self.repo.endpoint, self.repo.id, self.revision, self.name])
        return self.folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"


def pull_adapter(
    registry: "AdapterRegistry",
    repo_id: str,
    *,
    revision: str | None = None,
    name: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    offline: bool = False,
    adopt: bool = False,
    base: "ResolvedBase | None" = None,
    verify: Literal["files", "probes"] = "files",
    progress: Progress | None = None,
) -> PullReceipt:
    """Bring a published version into the registry under `name` (default: its own), verified.

    `revision` is a tag (`v3`), a full commit, a branch, or `@alias`, which moves the local alias too; None takes the
    highest version. `adopt` takes a repository that plain PEFT made, measured on `base` and numbered here.
    `offline` answers from what was pulled before, without asking the hub. `verify="probes"` also loads the base and
    replays the recorded behaviour (or, adopting, records it). A failed pull can be repeated: files that are complete
    are not fetched again.

    Raises:
        IntegrityError: bytes are not those of the manifest, twice in a row.
        AdapterRejectedError, BaseMismatchError, RegistryError: from taking it in.
        HubPermissionError, HubUnreachableError, UnknownNameError: from the hub.
        ResourceError: the disk is full, or the home cannot be written to.
    """
    plain = (revision or "").removeprefix("@")
    if revision is not None and not (REVISION.fullmatch(plain) and (plain == revision or is_alias(plain))):
        raise UsageError(f"Wanted a revision like v3, @prod, a branch or a 40-hex commit; got {revision!r:.80}.")
    repo = HubRepo(repo_id, endpoint=endpoint, token=token)
    wish, tell = _Wish(repo, revision, name, registry.home / PULLS, base, verify), progress or (lambda _: None)
    if offline:
        return _checked(registry, wish, _remembered(registry, wish))
    with registry.guard(f"pull {repo_id}"):
        receipt = _pull(registry, wish, adopt, tell)
        if plain != revision and revision is not None:
            registry.set_alias(receipt.manifest.name, plain, version=receipt.manifest.version)
        _remember(wish, receipt)
    return receipt


def _pull(registry: "AdapterRegistry", wish: _Wish, adopt: bool, tell: Progress) -> PullReceipt:
    repo = wish.repo
    tag, sha = _pin(repo, wish.revision)
    tell(f"{repo.id} is at {sha}")
    make_folder(wish.folder)
    folder = wish.folder / hashlib.sha256(f"{repo.endpoint} {repo.id} {sha}".encode()).hexdigest()[:32]
    with FileLock(pull_lock(folder)):
        if MANIFEST_FILE in repo.files(sha):
            receipt = _pull_verified(registry, wish, sha, tag, folder, tell)
        elif adopt:
            receipt = _adopt(registry, wish, sha, folder, tell)
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


def _pull_verified(
    registry: "AdapterRegistry", wish: _Wish, sha: str, tag: str | None, folder: Path, tell: Progress
) -> PullReceipt:
    """Fetch and take in; once more from nothing when the bytes are not what the manifest says."""
    for attempt in range(2):
        try:
            return _take_in(registry, wish, sha, tag, folder, tell)
        except IntegrityError:
            shutil.rmtree(folder, ignore_errors=True)
            if attempt:
                raise
            tell("the bytes do not match the manifest: fetching them once more")
    raise AssertionError("unreachable")


def _take_in(
    registry: "AdapterRegistry", wish: _Wish, sha: str, tag: str | None, folder: Path, tell: Progress
) -> PullReceipt:
    manifest = read_manifest(wish.repo.download(sha, MANIFEST_FILE, folder).read_bytes())
    if tag not in (None, f"v{manifest.version}"):
        raise IntegrityError(f"{wish.repo.id} says {tag}, its manifest says v{manifest.version}. Do not trust it.")
    here = _intact(registry, f"{wish.name or manifest.name}:{manifest.version}", manifest.digest)
    if here is not None:
        return _checked(registry, wish, PullReceipt(here, sha, "store"))
    listed = wish.repo.files(sha)
    names = [*manifest.files, *({SIGNATURE_FILE} & set(listed))]
    _check_promise(manifest, {name: file.size for name, file in listed.items()})
    for name in names:
        tell(f"fetching {name}, {listed[name].size} bytes")
        wish.repo.download(sha, name, folder)
    plain = folder / "adapter"
    shutil.rmtree(plain, ignore_errors=True)
    plain.mkdir()
    # The client keeps its own notes beside what it fetched; the registry is shown the adapter's files alone.
    for name in [MANIFEST_FILE, *names]:
        (plain / name).hardlink_to(folder / name)
    taken = import_adapter(registry, plain, name=wish.name, expected=manifest, base=wish.base, verify=wish.verify)
    return PullReceipt(taken, sha, "hub")


def _checked(registry: "AdapterRegistry", wish: _Wish, receipt: PullReceipt) -> PullReceipt:
    """The receipt of a version that is here already, once it behaves as recorded, where that is asked for."""
    if wish.verify == "probes":
        from adapterhub_lite.registry.check.replay import check_stored

        check_stored(registry, receipt.manifest, base=wish.base)
    return receipt


def _intact(registry: "AdapterRegistry", reference: str, digest: str) -> AdapterManifest | None:
    """The version as it is here, with every byte of it compared; None where something is missing or damaged."""
    try:
        here = registry.resolve(reference)
        for file in here.files:
            registry.file(here, file, verify=True)
    except (UnknownNameError, IntegrityError):
        return None
    return here if here.digest == digest else None


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


def _adopt(registry: "AdapterRegistry", wish: _Wish, sha: str, folder: Path, tell: Progress) -> PullReceipt:
    known = _memo(registry, wish)
    if known is not None and known.commit == sha:
        return _checked(registry, wish, PullReceipt(known.manifest, sha, "store"))
    listed = wish.repo.files(sha)
    missing = [f"it has no {name}" for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in listed]
    if missing:
        raise AdapterRejectedError(wish.repo.id, missing)
    plain = folder / "adapter"
    shutil.rmtree(plain, ignore_errors=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if listed[name].size > ALLOWED_SIZES[name]:
            raise AdapterRejectedError(wish.repo.id, [f"{name} has {listed[name].size} bytes: too many"])
        tell(f"fetching {name}, {listed[name].size} bytes")
        fetched = wish.repo.download(sha, name, folder)
        if not listed[name].holds(fetched):
            shutil.rmtree(folder, ignore_errors=True)
            raise IntegrityError(f"{name} of {wish.repo.id} did not arrive as the hub lists it. Pull again.")
        plain.mkdir(exist_ok=True)
        (plain / name).hardlink_to(fetched)
    name = wish.name or wish.repo.id.rpartition("/")[2]
    manifest = registry.add(plain, name, base=wish.base, verify=wish.verify)
    return PullReceipt(manifest, sha, "hub")


def _remember(wish: _Wish, receipt: PullReceipt) -> None:
    manifest = receipt.manifest
    said = {"commit": receipt.commit, "reference": manifest.reference, "digest": manifest.digest}
    write_durably(wish.memo, json.dumps(said).encode())


def _remembered(registry: "AdapterRegistry", wish: _Wish) -> PullReceipt:
    found = _memo(registry, wish)
    if found is None:
        raise HubUnreachableError(
            f"{wish.repo.id} at {wish.revision or 'its newest version'} was not pulled here, or what was pulled is gone or damaged. "
            "Pull it once online."
        )
    return found


def _memo(registry: "AdapterRegistry", wish: _Wish) -> PullReceipt | None:
    """What an earlier pull of the same wish came to, where that is still here, byte for byte."""
    if not wish.memo.exists():
        return None
    memo = json.loads(wish.memo.read_text())
    manifest = _intact(registry, memo["reference"], memo["digest"])
    return PullReceipt(manifest, memo["commit"], "offline") if manifest else None
