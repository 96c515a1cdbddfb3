"""Publishing to a hub exactly once. Knows the order of steps; the wire is `hub_client`, the way back `hub_pull`.

A publish is one commit whose description carries a transaction id, the digest and the version. It goes on top of a
commit whose whole log was read, so two publishers cannot both take a version, and after a lost answer the log says
whether the commit landed. The tag comes last: what has a tag is complete.
"""

import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.folder import ALLOWED_FILES, ALLOWED_SIZES
from adapterhub_lite.adapter_format.manifest import (
    LOSS_FILE,
    MANIFEST_FILE,
    PROBES_FILE,
    AdapterManifest,
    AdapterReference,
    read_manifest,
)
from adapterhub_lite.errors import HubPermissionError, IntegrityError, PublishConflictError, RegistryError
from adapterhub_lite.registry.hub.card import card_files
from adapterhub_lite.registry.hub.client import WRITE_TRIES, HubRepo, Patience, RemoteCommit
from adapterhub_lite.registry.hub.errors import ConflictError
from adapterhub_lite.registry.hub.receipts import Progress, PushReceipt
from adapterhub_lite.registry.operations.export import adapter_files
from adapterhub_lite.registry.store.database import evaluations_of
from adapterhub_lite.registry.store.store import Store


@dataclass(frozen=True)
class _Publish:
    """One version on its way out: all its files, and the id by which its commit is known again."""

    manifest: AdapterManifest
    content: dict[str, Path | bytes]
    transaction: str

    @property
    def claim(self) -> str:
        """The commit's description: what it publishes, for people and for `_published`."""
        version, digest = self.manifest.version, self.manifest.digest
        return f"adapterhub-txn: {self.transaction}\nadapterhub-version: {version}\nadapterhub-digest: {digest}"


def push_adapter(
    store: Store,
    reference: str | AdapterReference,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> PushReceipt:
    """Publish a version under `repo_id` as tag `v<version>`, exactly once; a digest that is there is left alone.

    `progress` is told each step in words; bars for bytes are `huggingface_hub`'s own.

    Raises:
        RegistryError: an earlier version of this project kept it with a file that pulls refuse.
        PublishConflictError: the version number holds another adapter there, or others kept publishing in between.
        HubPermissionError: missing rights, each case with its own sentence.
        HubUnreachableError: no answer after bounded tries; trying again later finishes what was begun.
        IntegrityError: a file of the version is missing or damaged here; nothing was sent.
    """
    manifest, tell = store.resolve(reference), progress or (lambda _: None)
    if older := sorted(set(manifest.files) - ALLOWED_FILES):
        raise RegistryError(
            f"{manifest.reference} has {', '.join(older)}, from an earlier version of adapterhub-lite, which no pull takes. "
            f"`adapterhub-lite export {manifest.reference} DIR`, then `adapterhub-lite add DIR {manifest.name}`, makes it anew."
        )
    with store.hold(manifest):  # a collection meanwhile must not take the files away
        return _push(store, manifest, HubRepo(repo_id, endpoint=endpoint, token=token), private, tell)


def _push(store: Store, manifest: AdapterManifest, repo: HubRepo, private: bool, tell: Progress) -> PushReceipt:
    # The card is for people: it also says what was measured after the manifest was written.
    known = manifest.model_copy(update={"evaluation": evaluations_of(store.read(), manifest)})
    content: dict[str, Path | bytes] = {**adapter_files(store, manifest), **card_files(known, repo.id)}
    if not repo.exists():
        tell(f"creating {repo.id}")
        repo.create(private)
    elif private and not repo.is_private():
        raise HubPermissionError(f"{repo.id} exists and is public, but private was asked for. Make it private first.")
    publish = _Publish(manifest, content, uuid.uuid4().hex)
    commit, tag, sent = _commit_once(repo, publish, tell)
    tell(f"tagging {tag}")
    try:
        repo.tag(tag, commit)
    except ConflictError as error:
        raise _taken(repo.id, manifest) from error
    return PushReceipt(repo.id, commit, tag, manifest.digest, uploaded=sent > 0, commits_sent=sent)


def _commit_once(repo: HubRepo, publish: _Publish, tell: Progress) -> tuple[str, str, int]:
    """(commit, tag, commits sent): send the commit until the log shows it, or shows an earlier one of this digest."""
    name, sent, patience = publish.manifest.reference, 0, Patience()
    for attempt in range(WRITE_TRIES):
        head = repo.head()
        if found := _published(repo, head, publish):
            return *found, sent
        gone = sorted(set(repo.files(head)) & {*ALLOWED_FILES, LOSS_FILE} - set(publish.content))
        tell(f"publishing {name}" + (f", try {attempt + 1}" if attempt else ""))
        with patience.sending(attempt):
            sent += 1
            title = f"{publish.manifest.name} v{publish.manifest.version}"
            repo.commit(head, title, publish.claim, publish.content, gone)
    raise PublishConflictError(
        f"Others kept publishing to {repo.id} while {name} was; try again later."
    ) from patience.last


def _published(repo: HubRepo, head: str, publish: _Publish) -> tuple[str, str] | None:
    """(commit, tag) of this digest in the history of `head`, with its files proved to be there; None if not.

    The files are compared because the client leaves out those it believes unchanged, from a listing that may be old.
    """
    manifest, tag = publish.manifest, f"v{publish.manifest.version}"
    log = repo.log(head)
    for commit in log:
        version, digest = _claimed(commit)
        own = publish.transaction in commit.text
        wanted = set(publish.content) if own else set(manifest.files) - {PROBES_FILE}
        if digest == manifest.digest and _complete(repo, commit.sha, publish, wanted):
            return commit.sha, f"v{version}"
        if version == manifest.version and digest != manifest.digest:
            raise _taken(repo.id, manifest)
    sha = repo.tags().get(tag)
    if sha is None or any(commit.sha == sha for commit in log if publish.transaction in commit.text):
        return None
    if _digest_at(repo, sha) != manifest.digest:
        raise _taken(repo.id, manifest)
    return sha, tag


def _claimed(commit: RemoteCommit) -> tuple[int | None, str | None]:
    version = re.search(r"^adapterhub-version: (\d{1,9})$", commit.text, re.MULTILINE)
    digest = re.search(r"^adapterhub-digest: (sha256:[0-9a-f]{64})$", commit.text, re.MULTILINE)
    return (int(version[1]), digest[1]) if version and digest else (None, None)


def _complete(repo: HubRepo, sha: str, publish: _Publish, wanted: set[str]) -> bool:
    listed = repo.files(sha)
    return all(name in listed and listed[name].holds(publish.content[name]) for name in wanted)


def _digest_at(repo: HubRepo, sha: str) -> str | None:
    if MANIFEST_FILE not in repo.files(sha):
        return None
    try:
        return read_manifest(repo.read(sha, MANIFEST_FILE, size=ALLOWED_SIZES[MANIFEST_FILE])).digest
    except IntegrityError:
        return None


def _taken(repo_id: str, manifest: AdapterManifest) -> PublishConflictError:
    return PublishConflictError(
        f"{repo_id} has another adapter as v{manifest.version}, not {manifest.reference} ({manifest.digest:.19}...). "
        "Published versions never change: add the adapter again for a higher version, or push to another repository."
    )
