"""The only door to a hub: `huggingface_hub`, with its many exceptions turned into ours. Knows no adapters."""

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from adapterhub_lite.errors import HubError, HubUnreachableError, UsageError
from adapterhub_lite.registry.hub.bounds import ANSWER_BYTES, SLACK_BYTES, HubBounds, bounded
from adapterhub_lite.registry.hub.errors import CAUGHT, ConflictError, MissingRepoError, RestError, translate

T = TypeVar("T")
TRIES = 5
WRITE_TRIES = 20
LONGEST_REST_SECONDS = 60.0
# A commit asks for each large file's address, and for each part of it.
COMMIT_REQUESTS = 100_000


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit: size in bytes, and the hash the hub lists (sha256 for large files, else git's sha1)."""

    size: int
    oid: str

    def holds(self, content: Path | bytes) -> bool:
        """Whether the listed hash is that of `content`."""
        if len(self.oid) == 64:
            return self.oid == _digest(content, hashlib.sha256())
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        return self.oid == _digest(content, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))


@dataclass(frozen=True)
class RemoteCommit:
    """One line of the log; `text` is title and description."""

    sha: str
    text: str


def _digest(content: Path | bytes, digest: Any) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return str(digest.hexdigest())


class HubRepo:
    """One model repository on one hub. Reads are tried again on time-outs and 5xx; writes are tried once.

    `token` None uses the saved token only when `endpoint` is the configured hub: a token is never sent elsewhere
    unasked.
    """

    def __init__(self, repo_id: str, *, endpoint: str | None = None, token: str | None = None) -> None:
        elsewhere = endpoint is not None and endpoint.rstrip("/") != constants.ENDPOINT.rstrip("/")
        self.id = repo_id
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token: str | bool | None = False if token is None and elsewhere else token
        self._api = HfApi(endpoint=self.endpoint, token=self._token)

    def head(self, revision: str = "main") -> str:
        """The commit that a revision names now; the listing of refs must agree, so that neither is stale.

        Raises:
            UnknownNameError: no such revision.
            UsageError: it is a branch and a tag, at two commits.
            HubUnreachableError: the hub gave two answers in `TRIES` tries.
        """
        for attempt in range(TRIES):
            info = self._read(f"look up {revision}", self._api.model_info, self.id, revision=revision)
            sha = str(info.sha)
            if sha == revision:
                return sha
            refs = self._read("list branches", self._api.list_repo_refs, self.id)
            listed = {ref.target_commit for ref in (*refs.branches, *refs.tags) if ref.name == revision}
            if len(listed) > 1:
                raise UsageError(
                    f"{revision!r} of {self.id} is a branch and a tag, at two commits: {', '.join(sorted(listed))}. "
                    "Ask for one of them."
                )
            if listed <= {sha}:
                return sha
            rest(attempt)
        raise HubUnreachableError(f"{self.endpoint} gives two answers for {revision} of {self.id}; try again later.")

    def exists(self) -> bool:
        """Whether the repository is there and may be read."""
        try:
            self._read("look up the repository", self._api.model_info, self.id)
        except MissingRepoError:
            return False
        return True

    def is_private(self) -> bool:
        """Whether the repository is private."""
        return bool(self._read("look up the repository", self._api.model_info, self.id).private)

    def create(self, private: bool) -> None:
        """Create the repository; nothing happens when it is there already."""
        self._read("create the repository", self._api.create_repo, self.id, private=private, exist_ok=True)

    def tags(self) -> dict[str, str]:
        """Tag -> commit."""
        refs = self._read("list tags", self._api.list_repo_refs, self.id)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def log(self, sha: str) -> list[RemoteCommit]:
        """The commits from `sha` back, newest first. By commit rather than by branch, so that it cannot be stale."""
        commits = self._read("read the log", self._api.list_repo_commits, self.id, revision=sha)
        return [RemoteCommit(commit.commit_id, f"{commit.title}\n{commit.message}") for commit in commits]

    def files(self, sha: str) -> dict[str, RemoteFile]:
        """Path -> file at a commit."""

        def listing() -> list[Any]:
            return list(self._api.list_repo_tree(self.id, recursive=True, revision=sha))

        entries = [entry for entry in self._read("list files", listing) if hasattr(entry, "blob_id")]
        return {
            entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in entries
        }

    def download(self, sha: str, name: str, folder: Path, *, size: int) -> Path:
        """Fetch one file of a commit into `folder` as a plain file; one that is complete there is not fetched again.

        `size` is what was promised, or the most that is taken, in bytes.

        Raises:
            HubError: the hub sends more than that.
        """
        found = self._read(
            f"download {name}", self._api.hf_hub_download,
            self.id, name, revision=sha, local_dir=folder, cache_dir=folder / ".shared", most=size,
        )  # fmt: skip
        return Path(found)

    def read(self, sha: str, name: str, *, size: int) -> bytes:
        """One small file of a commit, of at most `size` bytes."""
        with TemporaryDirectory(prefix="adapterhub-") as folder:
            content = self.download(sha, name, Path(folder), size=size).read_bytes()
        if len(content) > size:
            raise HubError(f"{name} of {self.id} has {len(content)} bytes, at most {size} are read.")
        return content

    def commit(
        self, parent: str, title: str, description: str, added: Mapping[str, Path | bytes], gone: Sequence[str]
    ) -> str:
        """One commit on `main` on top of `parent`, tried once; returns its 40-hex id.

        Raises:
            ConflictError: `main` is not at `parent` any more, or is locked.
            HubUnreachableError: no answer; the commit may have landed all the same.
        """
        operations = [CommitOperationAdd(name, str(c) if isinstance(c, Path) else c) for name, c in added.items()]
        limits = HubBounds(f"commit to {self.id}", self.endpoint, requests=COMMIT_REQUESTS, own_host_only=False)
        with self._translated("commit"), bounded(limits):
            done = self._api.create_commit(
                self.id, [*operations, *(CommitOperationDelete(name) for name in gone)],
                commit_message=title, commit_description=description, parent_commit=parent,
            )  # fmt: skip
        return str(done.oid)

    def tag(self, name: str, sha: str) -> None:
        """Create a tag; ConflictError when it exists and points elsewhere."""
        try:
            self._read(f"tag {name}", self._api.create_tag, self.id, tag=name, revision=sha)
        except ConflictError:
            if self.tags().get(name) != sha:
                raise

    def _read(self, doing: str, call: Callable[..., T], *args: Any, most: int | None = None, **kwargs: Any) -> T:
        """Call the client, within bounds: for a file its size `most`, else what any answer may have."""
        # Downloads are tried again inside the client already, with long waits of their own.
        tries = TRIES if most is None else 2
        for attempt in range(tries):
            limit = ANSWER_BYTES if most is None else most + SLACK_BYTES
            # A file may lie with another host than the hub's; nothing else does.
            limits = HubBounds(f"{doing} of {self.id}", self.endpoint, limit=limit, own_host_only=most is None)
            try:
                with self._translated(doing), bounded(limits):
                    return call(*args, **kwargs)
            except HubUnreachableError as error:
                if attempt == tries - 1:
                    raise
                rest(attempt, error)
        raise AssertionError("unreachable")

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except CAUGHT as error:
            raise translate(error, doing, self.id, self.endpoint, self._identity) from error

    def _identity(self) -> dict[str, Any] | None:
        try:
            with bounded(HubBounds("ask who the token stands for", self.endpoint)):
                return dict(self._api.whoami())
        except (HubError, *CAUGHT):
            return None


@dataclass
class Patience:
    """Of one write that is tried again and again: how often the hub was not there, and the last conflict."""

    lost: int = 0
    last: ConflictError | None = None

    @contextmanager
    def sending(self, attempt: int) -> Iterator[None]:
        """Take a conflict or a hub that is away as a reason to try again, after a rest.

        Raises:
            HubUnreachableError: the hub has been away `TRIES` times.
        """
        try:
            yield
        except HubUnreachableError as error:
            self.lost += 1
            if self.lost == TRIES:
                raise
            rest(attempt, error)
        except ConflictError as error:
            self.last = error
            rest(attempt, error)


def rest(attempt: int, error: Exception | None = None) -> None:
    """Wait before the next try: exponential with full jitter up to 8 s, or what the hub asked for up to a minute."""
    if isinstance(error, RestError):
        time.sleep(min(error.seconds, LONGEST_REST_SECONDS) + random.uniform(0, 0.1))
    else:
        time.sleep(random.uniform(0, min(8.0, 0.1 * 2**attempt)))
