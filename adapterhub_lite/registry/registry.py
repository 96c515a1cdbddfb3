"""The registry: versions of adapters on this machine, each provable, with aliases that move and go back.

The public face: each method is one operation on a `Store`, in which errors of the machine become one sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from adapterhub_lite.adapter_format.manifest import (
    AdapterManifest,
    AdapterReference,
    EvaluationRecord,
    MergeRecipe,
    ParentRecord,
)
from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry.hub.receipts import Progress, PullReceipt, PushReceipt
from adapterhub_lite.registry.operations import aliases as alias_moves
from adapterhub_lite.registry.operations.aliases import AliasMove
from adapterhub_lite.registry.operations.backup import BackupIndex, restore_backup, write_backup
from adapterhub_lite.registry.operations.diff import AdapterDifference, compare_versions
from adapterhub_lite.registry.operations.examine import DoctorReport, examine_registry
from adapterhub_lite.registry.operations.export import export_folder
from adapterhub_lite.registry.operations.gc import (
    GcPlan,
    collect,
    one_version,
    plan_collection,
    remove_version,
    set_pin,
)
from adapterhub_lite.registry.operations.intake import About, Reading, add_adapter
from adapterhub_lite.registry.operations.list import (
    AdapterDetails,
    AdapterSummary,
    describe,
    filter_versions,
    summarize,
)
from adapterhub_lite.registry.operations.rebuild import RebuildReport, rebuild_database
from adapterhub_lite.registry.operations.sign import (
    Signature,
    TrustSettings,
    check_trusted,
    sign_version,
    verify_version,
)
from adapterhub_lite.registry.store.database import find_manifest, insert_evaluation, parse_stored
from adapterhub_lite.registry.store.journal import record_act
from adapterhub_lite.registry.store.store import Lease, Store

# Spelled here, for inside the class `list` is the method.
Manifests = list[AdapterManifest]


class AdapterRegistry:
    """Versions of adapters under `home` (default `$ADAPTERHUB_HOME`). One instance serves any number of threads.

    Every method raises ResourceError when the disk is full or the folder read-only, SchemaVersionError when a newer
    version of this project wrote the registry.
    """

    def __init__(self, home: str | Path | None = None) -> None:
        self.store = Store(adapterhub_home(home))
        self.trust = TrustSettings(self.store)

    @property
    def home(self) -> Path:
        """The folder that everything lies under."""
        return self.store.home

    def add(
        self,
        folder: str | Path,
        name: str,
        *,
        base: ResolvedBase | None = None,
        evaluation: Sequence[EvaluationRecord | Mapping[str, Any]] = (),
        task: str | None = None,
        examples: Sequence[str] = (),
        tags: Sequence[str] = (),
        parents: Sequence[ParentRecord] = (),
        recipe: MergeRecipe | None = None,
        answer_schema: Mapping[str, Any] | None = None,
        verify: Literal["files", "probes"] = "files",
        convert: bool = False,
        base_differs: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> AdapterManifest:
        """Validate the adapter in `folder` and keep it as the next version of `name`; all or nothing.

        `folder` is an adapter's, a checkpoint's or a run's, a zip or tar archive of one, or an adapter of MLX or GGUF;
        pickled weights are converted in a closed process with `convert`. `tell` hears what was done, dropped and left
        alone, in a sentence each; without it, that is logged.

        With `answer_schema`, a JSON schema, the version's answers are JSON after it unless a request asks otherwise.

        `base` None: the one that the folder's training record names, where it is on this machine. `base_differs`: the
        configuration may name another. `verify="probes"` loads the base and replays the folder's probes, or records
        them where there are none.

        Raises:
            AdapterRejectedError: with every problem of the adapter.
            BaseMismatchError: `base` is not the one it was trained on or names, or it behaves otherwise there.
            UsageError: no such folder, not a name, or no base known.
        """
        about = About(evaluation, task, examples, tags, parents, recipe, answer_schema)
        reading = Reading(convert, base_differs, tell) if tell else Reading(convert, base_differs)
        with self.store.guard(f"add {name!r}"):
            return add_adapter(
                self.store, Path(folder).expanduser(), name, base=base, about=about, verify=verify, reading=reading
            )

    def resolve(self, reference: str | AdapterReference) -> AdapterManifest:
        """The manifest that `name` (newest), `name:3`, `name@alias` or a digest names now.

        Raises:
            UnknownNameError: there is none.
            ReferenceSyntaxError: not a reference.
            AdapterRejectedError: the policy requires a trusted signature, and it has none.
        """
        parsed = AdapterReference.parse(reference)
        with self.store.guard(f"resolve {parsed}"):
            manifest = self.store.resolve(parsed)
            check_trusted(self.store, manifest)
            return manifest

    def list(self, name: str | None = None, **filters: str | None) -> Manifests:
        """Every version (of `name`), by name and version; for `filters` see `listing.filter_versions`.

        Each manifest is parsed, once: 10,000 of them take a second the first time. `summaries` parses none.
        """
        wanted = filter_versions(name, **filters)
        sql = f"SELECT manifest FROM versions v WHERE {wanted.sql} ORDER BY name, version"  # noqa: S608 - values are bound
        with self.store.guard("list adapters"):
            return [parse_stored(row[0]) for row in self.store.read().execute(sql, wanted.values)]

    def summaries(self, name: str | None = None, **filters: str | None) -> Sequence[AdapterSummary]:
        """What `list` shows, one light line per version: 10,000 of them take under 100 ms."""
        with self.store.guard("list adapters"):
            return summarize(self.store.read(), filter_versions(name, **filters))

    def show(self, reference: str | AdapterReference) -> AdapterDetails:
        """All that is known here of one version: manifest, aliases, pin, signature, size, whether a server holds it."""
        with self.store.guard(f"show {reference}"):
            return describe(self.store, self.store.resolve(reference))

    def record_evaluation(
        self, reference: str | AdapterReference, measured: Sequence[EvaluationRecord]
    ) -> AdapterManifest:
        """Keep what was measured of a version beside its manifest, which never changes; lists and `show` have it.

        Raises:
            UnknownNameError: no such version.
        """
        with self.store.guard(f"record an evaluation of {reference}"), self.store.write() as connection:
            manifest = find_manifest(connection, AdapterReference.parse(reference))
            key = (manifest.name, manifest.version)
            for one in measured:
                record_act(
                    connection, self.home, act="evaluate", name=key[0], version=key[1], evaluation=one.model_dump()
                )
                insert_evaluation(connection, *key, one)
        return manifest

    def file(self, manifest: AdapterManifest, filename: str, *, verify: bool = False) -> Path:
        """The immutable local file `filename` of a version; read it, never write to it. See `Store.file`."""
        return self.store.file(manifest, filename, verify=verify)

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of `name` and the versions they point at."""
        with self.store.guard(f"read the aliases of {name!r}"):
            rows = self.store.read().execute("SELECT alias, version FROM aliases WHERE name = ? ORDER BY alias", [name])
            return dict(rows.fetchall())

    def set_alias(self, name: str, alias: str, *, version: int, expect: int | None = None) -> None:
        """Point `name@alias` at `version`; with `expect` only if it points there now (0: only if there is none).

        Raises:
            AliasConflictError: it points elsewhere.
            UnknownNameError: no such name or version.
        """
        with self.store.guard(f"move {name}@{alias}"), self.store.write() as connection:
            alias_moves.move_alias(connection, self.home, name, alias, version, expect)

    def remove_alias(self, name: str, alias: str) -> None:
        """Take `name@alias` away; its history stays.

        Raises:
            UnknownNameError: no such alias.
        """
        with self.store.guard(f"drop {name}@{alias}"), self.store.write() as connection:
            alias_moves.drop_alias(connection, self.home, name, alias)

    def rollback(self, name: str, alias: str) -> int:
        """Point `name@alias` where it pointed before, one further back at each call; returns the version.

        Raises:
            UnknownNameError: no such alias.
            UsageError: nothing earlier to go back to.
        """
        with self.store.guard(f"roll back {name}@{alias}"), self.store.write() as connection:
            return alias_moves.roll_back(connection, self.home, name, alias)

    def history(self, name: str, alias: str | None = None) -> Sequence[AliasMove]:
        """Every move of the aliases of `name` (or of one of them), oldest first."""
        with self.store.guard(f"read the history of {name!r}"):
            return alias_moves.alias_history(self.store.read(), name, alias)

    def diff(
        self, one: str | AdapterReference, other: str | AdapterReference, *, layers: bool = True
    ) -> AdapterDifference:
        """How two versions differ; with `layers` down to the subspaces of their changes, which loads torch."""
        with self.store.guard(f"compare {one} with {other}"):
            return compare_versions(self.store, self.store.resolve(one), self.store.resolve(other), layers=layers)

    def hold(self, reference: str | AdapterReference | AdapterManifest) -> Lease:
        """Keep a version from being collected while it is in use; release the lease, or leave its `with` block.

        Raises:
            UnknownNameError: it is not there (any more).
            AdapterRejectedError: the policy requires a trusted signature, and it has none.
        """
        with self.store.guard(f"hold {reference}"):
            manifest = reference if isinstance(reference, AdapterManifest) else self.store.resolve(reference)
            check_trusted(self.store, manifest)
            return self.store.hold(manifest)

    def pin(self, reference: str | AdapterReference) -> None:
        """Keep a version whatever a collection thinks."""
        with self.store.guard(f"pin {reference}"):
            set_pin(self.store, self.store.resolve(reference), pinned=True)

    def unpin(self, reference: str | AdapterReference) -> None:
        """Take a pin away; again is no error."""
        with self.store.guard(f"unpin {reference}"):
            set_pin(self.store, self.store.resolve(reference), pinned=False)

    def remove(self, reference: str) -> None:
        """Forget the version `name:3`; its bytes go with the next `gc`, its number is never given again.

        Raises:
            RegistryError: an alias, a pin or a running server refers to it.
            UsageError: not a reference with a version.
        """
        with self.store.guard(f"remove {reference}"):
            remove_version(self.store, one_version(self.store, reference))

    def plan_gc(self, *, keep_newest: int = 1) -> GcPlan:
        """What `gc` would free now, and why the rest stays. Nothing is changed."""
        with self.store.guard("look for garbage"):
            return plan_collection(self.store, keep_newest)

    def gc(self, *, keep_newest: int = 1, announced: GcPlan | None = None) -> GcPlan:
        """Free every version that no alias, pin or running server refers to, but the `keep_newest` of each name.

        With `announced`, an earlier plan, no version goes that was not in it.
        """
        with self.store.guard("collect garbage"):
            return collect(self.store, keep_newest, announced)

    def sign(self, reference: str | AdapterReference, *, key: str = "default") -> Signature:
        """Sign a version with a key made by `signing.generate_key`.

        Raises:
            UnknownNameError: no such version or key.
        """
        with self.store.guard(f"sign {reference}"):
            return sign_version(self.store, self.store.resolve(reference), key)

    def verify(self, reference: str | AdapterReference) -> str | None:
        """Check a version's signature and every byte it covers; the trusted signer's name, or None for a stranger's.

        Raises:
            IntegrityError: not signed, the signature is wrong, or a file is not what was signed.
        """
        with self.store.guard(f"verify {reference}"):
            return verify_version(self.store, self.store.resolve(reference))

    def examine(self) -> DoctorReport:
        """Read everything and compare; see `doctor.examine_registry`."""
        with self.store.guard("examine the registry"):
            return examine_registry(self.store)

    def rebuild(self) -> RebuildReport:
        """Make the database again from the manifests and the journal; the old one is kept beside it."""
        with self.store.guard("rebuild the database"):
            return rebuild_database(self.store)

    def backup(self, path: str | Path, *, keys: bool = False) -> BackupIndex:
        """Write every version with aliases, history and signatures into one verified file; see `backup.write_backup`."""
        with self.store.guard(f"write the backup {path}"):
            return write_backup(self.store, Path(path).expanduser(), keys=keys)

    def restore(self, path: str | Path) -> BackupIndex:
        """Bring a backup into this home, which has no registry yet; see `backup.restore_backup`."""
        with self.store.guard(f"restore {path}"):
            return restore_backup(self.store, Path(path).expanduser())

    def export(self, reference: str | AdapterReference, folder: str | Path) -> Path:
        """Write a plain PEFT folder of one version; see `exporting.export_folder`."""
        with self.store.guard(f"export {reference}"):
            return export_folder(self.store, self.resolve(reference), Path(folder).expanduser())

    def push(
        self,
        reference: str | AdapterReference,
        repo_id: str,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        private: bool = False,
        progress: Progress | None = None,
    ) -> PushReceipt:
        """Publish a version to a hub, exactly once; see `hub.push.push_adapter`."""
        from adapterhub_lite.registry.hub.push import push_adapter

        with self.store.guard(f"push {reference}"):
            return push_adapter(
                self.store, reference, repo_id, endpoint=endpoint, token=token, private=private, progress=progress
            )

    def pull(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        name: str | None = None,
        alias: str | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        offline: bool = False,
        adopt: bool = False,
        subfolder: str | None = None,
        base: ResolvedBase | None = None,
        verify: Literal["files", "probes"] = "files",
        progress: Progress | None = None,
    ) -> PullReceipt:
        """Take in a version from a hub, verified, under a local name; see `hub.pull.pull_adapter`."""
        from adapterhub_lite.registry.hub.pull import pull_adapter

        with self.store.guard(f"pull {repo_id}"):
            return pull_adapter(
                self.store, repo_id, revision=revision, name=name, alias=alias, endpoint=endpoint, token=token,
                offline=offline, adopt=adopt, subfolder=subfolder, base=base, verify=verify, progress=progress,
            )  # fmt: skip

    def close(self) -> None:
        """Close this thread's connection to the database."""
        self.store.database.close()
