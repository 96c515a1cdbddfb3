"""The only door to a hub: `huggingface_hub`, bounded, with its many exceptions turned into ours. Knows no adapters.

A hub may send us so many bytes, in so much time, in so many answers, and the token goes to its host alone.
`huggingface_hub` sends everything through one client of the process. Two hooks on that client look whether an operation
of ours runs in this context, and leave all other requests as they are. A promise is a size that was listed before the
bytes came; where there is none, a named limit stands in.

Aliases are a file on `main`, `aliases.json`, changed only on top of the commit it was read from.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session

from adapterhub_lite.adapter_format.manifest import ALIASES_FILE, MAX_VERSION, is_alias
from adapterhub_lite.adapter_format.strict_reading import strict_json
from adapterhub_lite.errors import (
    AliasConflictError,
    HubError,
    HubUnreachableError,
    IntegrityError,
    PublishConflictError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry.hub.errors import CAUGHT, ConflictError, MissingRepoError, RestError, translate

ANSWER_BYTES = 32 << 20
MOST_REQUESTS = 400
# An answer may take this long, and longer by what it brings at the slowest rate that is waited for.
GRACE_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 10_000
SILENCE_SECONDS = 60.0
# What errors, redirects and a download's look-ups bring besides the file itself.
SLACK_BYTES = 1 << 20
T = TypeVar("T")
TRIES = 5
WRITE_TRIES = 20
LONGEST_REST_SECONDS = 60.0
# A commit asks for each large file's address, and for each part of it.
COMMIT_REQUESTS = 100_000
SECRETS = ("authorization", "cookie")
ALIASES_BYTES = 1 << 20


@dataclass
class HubBounds:
    """What is left to one operation at `endpoint`. Counts decoded bytes too, which may be far more than came."""

    doing: str
    endpoint: str
    limit: int = ANSWER_BYTES
    requests: int = MOST_REQUESTS
    own_host_only: bool = True
    clock: Callable[[], float] = time.monotonic
    received: int = 0
    decoded: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def receive(self, count: int) -> None:
        """Count bytes of the wire. Raises HubError when they are too many, or come too slowly."""
        self.received += count
        self._require(self.received <= self.limit, f"it sends more than {self.limit} bytes")
        patience = GRACE_SECONDS + self.received / SLOWEST_BYTES_PER_SECOND
        self._require(self.clock() - self.started <= patience, "it sends too slowly")

    def decode(self, count: int) -> None:
        """Count decoded bytes. Raises HubError when they are too many."""
        self.decoded += count
        self._require(self.decoded <= self.limit, f"it sends more than {self.limit} bytes, compressed")

    def before(self, request: httpx2.Request) -> None:
        """Look at a request before it is sent: its host, its number, how long it may stay without an answer."""
        self.requests -= 1
        self._require(self.requests >= 0, "it has more and more pages")
        if _origin(request.url) != _origin(httpx2.URL(self.endpoint)):
            self._require(not self.own_host_only, f"it points to another host, {request.url.host!r:.80}")
            for name in SECRETS:
                request.headers.pop(name, None)
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: SILENCE_SECONDS if waits.get(kind) is None else waits[kind]
            for kind in ("connect", "read", "write", "pool")
        }

    def after(self, response: httpx2.Response) -> None:
        """Count what an answer brings, while it is read."""
        announced = response.headers.get("content-length", "")
        if response.request.method != "HEAD" and announced.isdigit():
            self._require(
                int(announced) <= self.limit, f"it announces {announced} bytes, at most {self.limit} are read"
            )
        response.stream = _Counted(response.stream, self.receive)  # type: ignore[arg-type] # sync, as the client is
        decoded = response.iter_bytes

        def counted(chunk_size: int | None = None) -> Iterator[bytes]:
            for chunk in decoded(chunk_size):
                self.decode(len(chunk))
                yield chunk

        response.iter_bytes = counted  # type: ignore[method-assign]

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise HubError(f"Could not {self.doing} at {self.endpoint}: {problem}. Do not trust this hub.")


class _Counted(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._count(len(chunk))
            yield chunk

    def close(self) -> None:
        self._stream.close()


_current: ContextVar[HubBounds | None] = ContextVar("hub_bounds", default=None)


@contextmanager
def bounded(bounds: HubBounds) -> Iterator[None]:
    """A block in which everything that `huggingface_hub` sends from this context keeps to `bounds`."""
    client = get_session()
    hooks = client.event_hooks
    # The client may be another one than at the last call: it is closed at a fork, and users may bring their own.
    if _before not in hooks["request"]:
        client.event_hooks = {"request": [*hooks["request"], _before], "response": [*hooks["response"], _after]}
    token = _current.set(bounds)
    try:
        yield
    finally:
        _current.reset(token)


def _before(request: httpx2.Request) -> None:
    bounds = _current.get()
    if bounds is not None:
        bounds.before(request)


def _after(response: httpx2.Response) -> None:
    bounds = _current.get()
    if bounds is not None:
        bounds.after(response)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


# Some ten thousand aliases.
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


def remote_aliases(repo_id: str, *, endpoint: str | None = None, token: str | None = None) -> dict[str, int]:
    """The aliases on the hub: alias -> version."""
    repo = HubRepo(repo_id, endpoint=endpoint, token=token)
    return aliases_at(repo, repo.head())


def aliases_at(repo: HubRepo, sha: str) -> dict[str, int]:
    """The aliases as a commit has them; IntegrityError when the file is not such a table."""
    if ALIASES_FILE not in repo.files(sha):
        return {}
    content = repo.read(sha, ALIASES_FILE, size=ALIASES_BYTES)
    try:
        found = strict_json(content, what="it", limit=ALIASES_BYTES)
    except ValueError as error:
        text = f"{ALIASES_FILE} of {repo.id} is not a table of aliases and versions: {error}. Mend it by hand."
        raise IntegrityError(text) from error
    if not all(is_alias(key) and type(value) is int and 0 < value <= MAX_VERSION for key, value in found.items()):
        raise IntegrityError(f"{ALIASES_FILE} of {repo.id} is not a table of aliases and versions. Mend it by hand.")
    return found


def push_alias(
    repo_id: str,
    alias: str,
    version: int | None,
    *,
    expect: int | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> dict[str, int]:
    """Point `alias` at a published version (None removes it) and return all aliases; by compare-and-swap.

    With `expect` nothing changes unless it points there (0: unless there is none); without it the last writer wins.
    No other alias is ever lost.

    Raises:
        AliasConflictError: it points elsewhere than `expect`.
        UnknownNameError: the version is not published.
        PublishConflictError, HubUnreachableError: others kept publishing, or no answer, after bounded tries.
    """
    if not is_alias(alias):
        raise UsageError(f"Wanted an alias of letters, digits, '.', '_', '-', not all digits; got {alias!r:.80}.")
    repo, patience = HubRepo(repo_id, endpoint=endpoint, token=token), Patience()
    for attempt in range(WRITE_TRIES):
        head = repo.head()
        found = aliases_at(repo, head)
        if found.get(alias) == version:
            return found
        if expect is not None and found.get(alias, 0) != expect:
            raise AliasConflictError(f"{alias!r} of {repo_id} is at {found.get(alias)}, not at {expect}. Look again.")
        if version is not None and f"v{version}" not in (tags := repo.tags()):
            raise UnknownNameError.among("published version", f"v{version}", sorted(tags))
        wanted = {key: value for key, value in {**found, alias: version}.items() if value is not None}
        text = json.dumps(wanted, indent=1, sort_keys=True).encode()
        with patience.sending(attempt):
            repo.commit(head, f"alias {alias} -> {version}", "", {ALIASES_FILE: text}, [])
    raise PublishConflictError(
        f"Others kept publishing to {repo_id} while {alias!r} was moved; try again later."
    ) from patience.last
