"""Pins, removal and garbage collection: what is kept and why, what is freed and how much, said before it is done."""

import contextlib
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import AdapterManifest, AdapterReference
from adapterhub_lite.errors import RegistryError, UsageError
from adapterhub_lite.registry.store.database import delete_version, parse_stored
from adapterhub_lite.registry.store.journal import record_act, settle_journal
from adapterhub_lite.registry.store.store import PULL_LOCK, PULLS, Store, leased_digests


@dataclass(frozen=True)
class GcPlan:
    """What a collection frees. `kept` says of each version why it stays; `freed_bytes` counts shared objects once.

    `leftovers` are what a crash left: unlisted manifests, half-written files, staging folders, broken-off pulls.
    """

    versions: tuple[str, ...]
    objects: tuple[str, ...]
    leftovers: tuple[Path, ...]
    freed_bytes: int
    kept: dict[str, str]


def plan_collection(store: Store, keep_newest: int, announced: GcPlan | None = None) -> GcPlan:
    """Say what `collect` would free now. Nothing is changed.

    Raises:
        UsageError: `keep_newest` is negative.
    """
    if keep_newest < 0:
        raise UsageError(f"Wanted keep_newest of 0 or more, got {keep_newest}.")
    connection = store.read()
    manifests = [parse_stored(row[0]) for row in connection.execute("SELECT manifest FROM versions")]
    kept = _reasons(connection, store.home, manifests, keep_newest)
    if announced is not None:
        late = {m.reference for m in manifests} - set(announced.versions)
        kept = dict.fromkeys(late, "not announced") | kept
    going = sorted((m for m in manifests if m.reference not in kept), key=lambda m: (m.name, m.version))
    needed = {f.sha256 for m in manifests if m.reference in kept for f in m.files.values()}
    objects = {sha256: path.stat().st_size for sha256, path in store.objects if sha256 not in needed}
    listed = {store.manifest_path(m.name, m.version) for m in manifests}
    leftovers = _leftovers(store.home, listed)
    return GcPlan(
        versions=tuple(m.reference for m in going),
        objects=tuple(sorted(objects)),
        leftovers=tuple(leftovers),
        freed_bytes=sum(objects.values()) + sum(_size(path) for path in leftovers),
        kept=kept,
    )


def collect(store: Store, keep_newest: int, announced: GcPlan | None = None) -> GcPlan:
    """Free what nothing refers to; returns what was freed. A crash midway leaves only more for the next time.

    With `announced`, a version that was not going to go then stays now.
    """
    with store.lock(exclusive=True):
        leased_digests(store.home, clear=True)
        with store.write(locked=True) as connection:
            settle_journal(connection, store.home)
            plan = plan_collection(store, keep_newest, announced)
            for reference in plan.versions:
                _forget(store, connection, store.resolve(reference))
        # Only what is no longer visible is deleted, and only after that is on disk.
        for reference in plan.versions:
            name, _, version = reference.rpartition(":")
            _delete_manifest(store.manifest_path(name, int(version)))
        for sha256 in plan.objects:
            store.objects.path(sha256).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                store.objects.path(sha256).parent.rmdir()
        for path in plan.leftovers:
            _sweep(path)
    return plan


def remove_version(store: Store, manifest: AdapterManifest) -> None:
    """Forget one version; its bytes go with the next collection, its number is never given again.

    Raises:
        RegistryError: an alias, a pin or a running server refers to it.
    """
    with store.lock(exclusive=True):
        with store.write(locked=True) as connection:
            check_removable(connection, store.home, manifest)
            _forget(store, connection, manifest)
        _delete_manifest(store.manifest_path(manifest.name, manifest.version))


def one_version(store: Store, reference: str) -> AdapterManifest:
    """The manifest of a reference that names its version, as removing wants it: a mistake costs one version at most.

    Raises:
        UsageError: it names none.
    """
    if AdapterReference.parse(reference).version is None:
        raise UsageError(f"Wanted the version to remove as 'name:3', got {reference!r}.")
    return store.resolve(reference)


def check_removable(connection: sqlite3.Connection, home: Path, manifest: AdapterManifest) -> None:
    """Raise RegistryError when an alias, a pin or a running server refers to the version."""
    reason = _reasons(connection, home, [manifest], 0).get(manifest.reference)
    if reason:
        raise RegistryError(f"{manifest.reference} stays: {reason}. Move the alias, unpin or unload it first.")


def set_pin(store: Store, manifest: AdapterManifest, *, pinned: bool) -> None:
    """Keep a version whatever a collection thinks, or no longer."""
    key = (manifest.name, manifest.version)
    with store.write() as connection:
        row = connection.execute("SELECT pinned FROM versions WHERE name = ? AND version = ?", key).fetchone()
        if row is not None and bool(row[0]) != pinned:
            act = "pin" if pinned else "unpin"
            record_act(connection, store.home, act=act, name=manifest.name, version=manifest.version)
            connection.execute("UPDATE versions SET pinned = ? WHERE name = ? AND version = ?", (pinned, *key))


def _reasons(
    connection: sqlite3.Connection, home: Path, manifests: list[AdapterManifest], keep_newest: int
) -> dict[str, str]:
    """Why each version stays, by its reference; those not in it may go."""
    reasons: dict[str, str] = {}
    counts: dict[str, int] = {}
    for manifest in sorted(manifests, key=lambda m: -m.version):
        counts[manifest.name] = counts.get(manifest.name, 0) + 1
        if counts[manifest.name] <= keep_newest:
            reasons[manifest.reference] = f"among the newest {keep_newest}"
    held = leased_digests(home)
    for name, version in connection.execute("SELECT name, version FROM versions WHERE pinned"):
        reasons[f"{name}:{version}"] = "pinned"
    for name, alias, version in connection.execute("SELECT name, alias, version FROM aliases ORDER BY alias DESC"):
        reasons[f"{name}:{version}"] = f"alias {alias}"
    for manifest in manifests:
        if manifest.digest in held:
            reasons[manifest.reference] = "held by a running server or push"
    # A merge that stays can be built again, so its parents stay, and theirs.
    by_digest = {m.digest: m for m in manifests}
    pending = [m for m in manifests if m.reference in reasons]
    while pending:
        child = pending.pop()
        for parent in (by_digest.get(p.digest) for p in child.parents):
            if parent is not None and parent.reference not in reasons:
                reasons[parent.reference] = f"parent of {child.reference}"
                pending.append(parent)
    present = {m.reference for m in manifests}
    return {reference: reason for reference, reason in reasons.items() if reference in present}


def _forget(store: Store, connection: sqlite3.Connection, manifest: AdapterManifest) -> None:
    name, version, digest = manifest.name, manifest.version, manifest.digest
    record_act(connection, store.home, act="remove", name=name, version=version, digest=digest)
    delete_version(connection, name, version, digest)


def _leftovers(home: Path, listed: set[Path]) -> list[Path]:
    found = [path for path in (home / "manifests").glob("*/*") if path.with_suffix(".json") not in listed]
    found += (home / "staging").glob("*")
    found += [folder for folder in (home / PULLS).glob("*/") if _nobody_pulls(folder)]
    return sorted({*found, *home.glob(".rebuild-*")})


def _nobody_pulls(folder: Path, *, sweep: bool = False) -> bool:
    """Whether no pull into `folder` is going on; with `sweep` it is removed while none can begin."""
    from filelock import FileLock

    with contextlib.suppress(OSError), FileLock(f"{folder}{PULL_LOCK}").acquire(timeout=0):
        if sweep:
            shutil.rmtree(folder)
        return True
    return False


def _sweep(path: Path) -> None:
    if path.parent.name == PULLS:
        _nobody_pulls(path, sweep=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _delete_manifest(path: Path) -> None:
    path.with_suffix(".sig").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return path.stat().st_size
