"""Repositories as files on disk: contents by sha256, one JSON file per commit, one per repository. Knows no HTTP.

Everything is written aside and renamed, contents before the commit that names them, and the commit before the branch
that points to it. A copy of the folder made while the hub runs may still miss the newest contents; `HubStore` then
moves each branch back to its newest complete commit when it opens the copy, and says so in `recovered`.
"""

import hashlib
import json
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any  # JSON values, read back through the dataclasses below

NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
# As `git check-ref-format` has it, of a smaller alphabet. Names under refs/ are the hub's own.
REF = re.compile(r"(?!refs/|HEAD$)(?=.{1,100}$)[A-Za-z0-9](?!.*(\.\.|//|/\.|\.lock(/|$)|[/.]$))[\w.\-/]*", re.ASCII)
# Owners whose repositories would have the addresses of something else.
RESERVED = ("api", "buckets", "datasets", "kernels", "lfs", "models", "spaces")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{7,40}")
# Folder of each kind of repository under the root; a key is the address of a repository, `datasets/org/rows`.
FOLDERS = {"model": "repos", "dataset": "datasets"}
FIRST_FILE = b"".join(
    b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix for suffix in (b".safetensors", b".parquet", b".bin")
)
MAX_PATH, MAX_SEGMENT = 1024, 255


class HubRefusal(Exception):  # noqa: N818 - a status of the wire, never seen by a caller of the package
    """A refusal as the wire says it: HTTP status, text, and the `X-Error-Code` the client turns into a class."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(message)


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is git's sha1 of the blob (of the pointer for LFS), `xet` its Xet hash or ""."""

    sha256: str
    size: int
    oid: str
    lfs: bool = False
    xet: str = ""

    @property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()


Files = dict[str, Entry]
Message = tuple[str, str, str]  # title, description, author


@dataclass(frozen=True)
class Commit:
    """One immutable commit; `files` is the whole tree, path to entry."""

    sha: str
    parent: str
    title: str
    description: str
    author: str
    date: str
    files: Files


@dataclass(frozen=True)
class Repo:
    """A repository and where its branches and tags point; `gated` is "" for open, `kind` "model" or "dataset"."""

    id: str
    created: str
    private: bool = False
    gated: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    kind: str = "model"

    @property
    def key(self) -> str:
        """The address of the repository on the hub."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"


def repo_key(kind: str, repo_id: str) -> str:
    """The key of a repository; 501 for kinds that this hub does not hold."""
    if kind not in FOLDERS:
        raise HubRefusal(501, f"This hub holds models and data sets, no {kind} repositories.")
    return repo_id if kind == "model" else f"{kind}s/{repo_id}"


def is_name(repo_id: str) -> bool:
    """Whether a repository may be called so."""
    owner, _, name = repo_id.partition("/")
    if not NAME.fullmatch(repo_id) or ".git/" in f"{repo_id}/".lower() or owner.lower() in RESERVED:
        return False
    return not ("--" in repo_id or ".." in repo_id or owner[-1] in ".-" or name[-1] in ".-")


def check_path(path: str) -> None:
    """Refuse with 400 what cannot be a file's path on every client's disk: Windows reads `..\\x` and `C:x` too."""
    segments = path.split("/")
    bad = not path or len(path) > MAX_PATH or bool(re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", path))
    bad = bad or any(part in ("", ".", "..", ".git") or len(part.encode()) > MAX_SEGMENT for part in segments)
    if bad or re.match(r"[A-Za-z]:", path):
        raise HubRefusal(400, f"{path!r:.120} is not a valid path for a file in a repository.")


def apply_changes(files: Files, added: Files, gone: list[str]) -> Files:
    """The tree after a commit: `gone` (files and whole folders) is removed, then `added` is written over it.

    Raises HubRefusal 404 for a removal of nothing, 400 where a file would lie where a folder is, or the reverse.
    """
    for name in gone:
        hit = {path for path in files if path == name or path.startswith(f"{name.rstrip('/')}/")}
        if not hit:
            raise HubRefusal(404, f"A file with this name doesn't exist: {name}", "EntryNotFound")
        files = {path: entry for path, entry in files.items() if path not in hit}
    files = files | added
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    for path in added:
        clash = path if path in folders else next((str(p) for p in PurePosixPath(path).parents if str(p) in files), "")
        if clash:
            raise HubRefusal(400, f"{clash!r:.120} cannot be a file and a folder at once.")
    return files


class HubStore:
    """All repositories under `root`. Thread-safe: whatever moves a ref does so under `lock`.

    `quota_bytes` bounds what all commits of one repository may hold together; None for no bound. `recovered` lists the
    branches and tags that were moved back or dropped at the start, because the folder is a copy made in the middle of
    a write.
    """

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        self.root, self.incoming, self.lock = root, root / "incoming", threading.RLock()
        self.quota_bytes = quota_bytes
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)
        self.recovered = [line for repo in self.repos() for line in self._recover(repo)]

    def blob(self, sha256: str) -> Path:
        """Where the content with this sha256 lies, or would lie; 400 for anything that is none, such as a path."""
        if not SHA256.fullmatch(sha256):
            raise HubRefusal(400, f"{sha256!r:.80} is not a sha256.")
        return self.root / "blobs" / sha256[:2] / sha256[2:]

    def admit(self, upload: Path, sha256: str) -> None:
        """Move a finished upload among the contents; 400 when its bytes hash to something else."""
        with upload.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            upload.unlink()
            raise HubRefusal(400, f"The upload hashes to {found}, not to {sha256}.")
        self.blob(sha256).parent.mkdir(parents=True, exist_ok=True)
        upload.replace(self.blob(sha256))

    def regular(self, content: bytes) -> Entry:
        """Store a small file that came inside a commit."""
        upload, sha256 = self.incoming / uuid.uuid4().hex, hashlib.sha256(content).hexdigest()
        upload.write_bytes(content)
        self.admit(upload, sha256)
        return Entry(sha256, len(content), _git_oid(content))

    def large(self, sha256: str, xet: str) -> Entry:
        """The entry of a content that was uploaded before its commit."""
        size = self.blob(sha256).stat().st_size
        entry = Entry(sha256, size, "", lfs=True, xet=xet)
        return replace(entry, oid=_git_oid(entry.pointer))

    def _folder(self, key: str) -> Path:
        kind, repo_id = ("dataset", key.removeprefix("datasets/")) if key.count("/") == 2 else ("model", key)
        if not is_name(repo_id):
            raise HubRefusal(400, f"{repo_id!r:.120} is not a valid name, owner/name, for a repository.")
        return self.root / FOLDERS[kind] / repo_id

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        fresh = self.incoming / uuid.uuid4().hex
        fresh.write_text(json.dumps(value))
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.replace(path)

    def repos(self, kind: str = "") -> list[Repo]:
        """Every repository, or those of one kind, by name."""
        keys = [
            repo_key(one, f"{path.parts[-3]}/{path.parts[-2]}")
            for one, folder in FOLDERS.items()
            if kind in ("", one)
            for path in sorted(self.root.glob(f"{folder}/*/*/repo.json"))
        ]
        return [repo for key in keys if (repo := self.find(key)) is not None]

    def find(self, key: str) -> Repo | None:
        """The repository under exactly this key, or None, also for what no repository is called."""
        if not is_name(key.removeprefix("datasets/") if key.count("/") == 2 else key):
            return None
        try:
            raw = json.loads((self._folder(key) / "repo.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        # The address counts, not what the file says: a rename moves the folder first.
        kind = "dataset" if key.count("/") == 2 else "model"
        return Repo(**raw | {"id": key.removeprefix("datasets/") if kind == "dataset" else key, "kind": kind})

    def elsewhere(self, key: str) -> str | None:
        """The key that a repository has now that was renamed, or is written with other capitals; None for neither."""
        if not is_name(key.removeprefix("datasets/") if key.count("/") == 2 else key):
            return None
        for _ in range(10):
            try:
                key = str(json.loads((self._folder(key) / "moved.json").read_text())["to"])
            except (FileNotFoundError, NotADirectoryError):
                break
            if self.find(key):
                return key
        folder = self._folder(key)
        for path in folder.parents[1].glob("*/*/repo.json"):
            found = f"{path.parts[-3]}/{path.parts[-2]}"
            if found.lower() == f"{folder.parts[-2]}/{folder.parts[-1]}".lower():
                return repo_key("dataset" if key.count("/") == 2 else "model", found)
        return None

    def create(self, key: str, private: bool, files: Files | None = None, title: str = "initial commit") -> bool:
        """Create the repository with a first commit on `main`; False when it, or one with other capitals, exists."""
        self._folder(key)  # refuses what is no name, before anything is written
        with self.lock:
            other = self.elsewhere(key)
            if self.find(key) or (other and other.lower() == key.lower()):
                return False
            files = {".gitattributes": self.regular(FIRST_FILE)} if files is None else files
            first = self._record(key, "", (title, "", "hub"), files)
            kind = "dataset" if key.count("/") == 2 else "model"
            self.save(
                Repo(
                    key.split("/", 1)[1] if kind == "dataset" else key,
                    _now(),
                    private,
                    branches={"main": first},
                    kind=kind,
                )
            )
            (self._folder(key) / "moved.json").unlink(missing_ok=True)
            return True

    def save(self, repo: Repo) -> None:
        """Write a repository's settings and refs at once."""
        self._write(self._folder(repo.key) / "repo.json", asdict(repo))

    def delete(self, key: str) -> None:
        """Remove the repository; contents stay in the shared pool until they are collected."""
        with self.lock:
            trash = self.incoming / uuid.uuid4().hex
            self._folder(key).rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def move(self, old: str, new: str) -> None:
        """Rename a repository; the old key leads to the new one until it is used again. 409 when the new one exists."""
        with self.lock:
            other = self.elsewhere(new)
            if self.find(new) or (other and other.lower() == new.lower() and other != old):
                kind = "dataset" if new.count("/") == 2 else "model"
                raise HubRefusal(409, f"A {kind} repository called {new.removeprefix('datasets/')} already exists.")
            target = self._folder(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)  # at most the mark of an earlier rename
            self._folder(old).rename(target)
            self._write(self._folder(old) / "moved.json", {"to": new})

    def resolve(self, repo: Repo, revision: str) -> str:
        """The 40-hex commit of a branch, a tag, or the 7 to 40 first digits of one; 404 RevisionNotFound otherwise."""
        sha = repo.branches.get(revision) or repo.tags.get(revision) or revision
        folder = self._folder(repo.key) / "commits"
        if COMMIT.fullmatch(sha) and (folder / f"{sha}.json").exists():
            return sha
        found = list(folder.glob(f"{sha}*.json")) if COMMIT.fullmatch(sha) else []
        if len(found) != 1:
            raise HubRefusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0].stem

    def commit(self, key: str, sha: str) -> Commit:
        """Read one commit."""
        raw = json.loads((self._folder(key) / f"commits/{sha}.json").read_text())
        return Commit(**raw | {"sha": sha, "files": {path: Entry(**entry) for path, entry in raw["files"].items()}})

    def log(self, key: str, sha: str) -> Iterator[Commit]:
        """The commits from `sha` back, newest first."""
        while sha:
            commit = self.commit(key, sha)
            yield commit
            sha = commit.parent

    def named_contents(self, key: str) -> dict[str, int]:
        """sha256 to size of every content that some commit of the repository names, whether a ref leads to it or not."""
        found: dict[str, int] = {}
        for path in (self._folder(key) / "commits").glob("*.json"):
            found |= {entry["sha256"]: entry["size"] for entry in json.loads(path.read_text())["files"].values()}
        return found

    def check_quota(self, key: str, added: dict[str, int]) -> None:
        """Refuse with 413 what would put the repository above its quota; `added` is sha256 (or any name) to size."""
        if self.quota_bytes is not None:
            total = sum((self.named_contents(key) | added).values())
            if total > self.quota_bytes:
                raise HubRefusal(413, f"{key} would hold {total:,} bytes; this hub allows {self.quota_bytes:,} each.")

    def add_commit(self, key: str, branch: str, parent: str, message: Message, added: Files, gone: list[str]) -> str:
        """Move `branch` on by a commit; 412 when `parent` is not its head."""
        with self.lock:
            repo = self.find(key)
            if repo is None or branch not in repo.branches:
                raise HubRefusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = repo.branches[branch]
            if parent and not (parent == head or (len(parent) >= 7 and head.startswith(parent))):
                text = "The branch was updated since you opened this page. Please refresh and try again."
                raise HubRefusal(412, f"A commit has happened since. {text}")
            self.check_quota(key, {entry.sha256: entry.size for entry in added.values()})
            sha = self._record(key, head, message, apply_changes(self.commit(key, head).files, added, gone))
            self.save(replace(repo, branches=repo.branches | {branch: sha}))
            return sha

    def squash(self, key: str, branch: str, title: str, author: str) -> None:
        """Replace the history of a branch by one commit with the same files."""
        with self.lock:
            repo = self.find(key)
            if repo is None or branch not in repo.branches:
                raise HubRefusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            sha = self._record(key, "", (title, "", author), self.commit(key, repo.branches[branch]).files)
            self.save(replace(repo, branches=repo.branches | {branch: sha}))

    def set_ref(self, key: str, kind: str, name: str, revision: str | None, *, replace_it: bool = False) -> None:
        """Create one of `kind` "tags" or "branches" at `revision`, or remove it with None; 409 exists, 404 does not."""
        with self.lock:
            repo = self.find(key)
            if repo is None:
                raise HubRefusal(404, "Repository not found", "RepoNotFound")
            refs = dict(getattr(repo, kind))
            if revision is None:
                if (kind, name) == ("branches", "main"):
                    raise HubRefusal(403, "Cannot delete refs/heads/main: the default branch cannot be deleted.")
                if refs.pop(name, None) is None:
                    raise HubRefusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            elif name in refs and not replace_it:
                full = f"refs/{'heads' if kind == 'branches' else 'tags'}/{name}"
                raise HubRefusal(409, f"Reference {full} already exists.")
            else:
                refs[name] = self.resolve(repo, revision)
                if not REF.fullmatch(name) or re.fullmatch(r"[0-9a-f]{40}", name):
                    raise HubRefusal(400, f"{name!r:.120} is not a valid name for a reference.")
            self.save(replace(repo, branches=refs) if kind == "branches" else replace(repo, tags=refs))

    def _record(self, key: str, parent: str, message: Message, files: Files) -> str:
        sha, files = hashlib.sha1(uuid.uuid4().bytes, usedforsecurity=False).hexdigest(), dict(sorted(files.items()))
        self._write(
            self._folder(key) / f"commits/{sha}.json", asdict(Commit(sha, parent, *message, date=_now(), files=files))
        )
        return sha

    def _complete(self, key: str, sha: str) -> str:
        """The newest commit from `sha` back of which every content is there, or ""."""
        try:
            for commit in self.log(key, sha):
                if all(self.blob(entry.sha256).exists() for entry in commit.files.values()):
                    return commit.sha
        except FileNotFoundError:
            return ""
        return ""

    def _recover(self, repo: Repo) -> list[str]:
        whole = {name: self._complete(repo.key, sha) for name, sha in repo.branches.items()}
        kept = {name: sha for name, sha in repo.tags.items() if self._complete(repo.key, sha) == sha}
        branches = {name: sha for name, sha in whole.items() if sha}
        if branches == repo.branches and kept == repo.tags:
            return []
        self.save(replace(repo, branches=branches, tags=kept))
        moved = [
            f"{repo.key}: {name} moved back to {sha or 'nothing'}"
            for name, sha in whole.items()
            if sha != repo.branches[name]
        ]
        return moved + [f"{repo.key}: tag {name} dropped" for name in repo.tags.keys() - kept.keys()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
