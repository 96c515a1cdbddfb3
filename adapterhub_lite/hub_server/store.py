"""Repositories as files on disk: contents by sha256, one JSON file a commit, one a repository. Knows no HTTP."""

import hashlib
import json
import re
import shutil
import threading
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
REF = re.compile(r"[A-Za-z0-9][\w.\-/]{0,99}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
FIRST_FILE = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


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
    """A repository and where its branches and tags point; `gated` is "" for open."""

    id: str
    created: str
    private: bool = False
    gated: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class HubStore:
    """All repositories under `root`. Thread-safe: whatever moves a ref does so under `lock`."""

    def __init__(self, root: Path) -> None:
        self.root, self.incoming, self.lock = root, root / "incoming", threading.RLock()
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)

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
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(sha256, size, _git_oid(pointer.encode()), lfs=True, xet=xet)

    def _folder(self, repo_id: str) -> Path:
        if not NAME.fullmatch(repo_id):
            raise HubRefusal(400, f"{repo_id!r} is not of the form owner/name.")
        return self.root / "repos" / repo_id

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        fresh = self.incoming / uuid.uuid4().hex
        fresh.write_text(json.dumps(value))
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.replace(path)

    def repos(self) -> list[Repo]:
        """Every repository, by name."""
        return [Repo(**json.loads(path.read_text())) for path in sorted(self.root.glob("repos/*/*/repo.json"))]

    def find(self, repo_id: str) -> Repo | None:
        """The repository, or None."""
        path = self._folder(repo_id) / "repo.json"
        return Repo(**json.loads(path.read_text())) if path.exists() else None

    def create(self, repo_id: str, private: bool) -> bool:
        """Create the repository with a first commit on `main`; False when it is there already."""
        with self.lock:
            if self.find(repo_id):
                return False
            files = {".gitattributes": self.regular(FIRST_FILE)}
            first = self._record(repo_id, "", ("initial commit", "", "hub"), files)
            self.save(Repo(repo_id, _now(), private, branches={"main": first}))
            return True

    def save(self, repo: Repo) -> None:
        """Write a repository's settings and refs at once."""
        self._write(self._folder(repo.id) / "repo.json", asdict(repo))

    def delete(self, repo_id: str) -> None:
        """Remove the repository; contents stay in the shared pool."""
        with self.lock:
            shutil.rmtree(self._folder(repo_id))

    def resolve(self, repo: Repo, revision: str) -> str:
        """The 40-hex commit of a branch, a tag or a commit; 404 RevisionNotFound otherwise."""
        sha = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if not re.fullmatch(r"[0-9a-f]{40}", sha) or not (self._folder(repo.id) / f"commits/{sha}.json").exists():
            raise HubRefusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def commit(self, repo_id: str, sha: str) -> Commit:
        """Read one commit."""
        raw = json.loads((self._folder(repo_id) / f"commits/{sha}.json").read_text())
        return Commit(**raw | {"sha": sha, "files": {path: Entry(**entry) for path, entry in raw["files"].items()}})

    def _record(self, repo_id: str, parent: str, message: Message, files: Files) -> str:
        sha = hashlib.sha1(uuid.uuid4().bytes, usedforsecurity=False).hexdigest()
        commit = asdict(Commit(sha, parent, *message, date=_now(), files=files))
        self._write(self._folder(repo_id) / f"commits/{sha}.json", commit)
        return sha

    def add_commit(
        self, repo_id: str, branch: str, parent: str, message: Message, added: Files, gone: list[str]
    ) -> str:
        """Move `branch` on by a commit; 412 when `parent` is not its head."""
        with self.lock:
            repo = self.find(repo_id)
            if repo is None or branch not in repo.branches:
                raise HubRefusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = repo.branches[branch]
            if parent and parent != head:
                raise HubRefusal(412, "A commit has happened since. Please refresh and try again.")
            files = self.commit(repo_id, head).files
            for name in gone:
                hit = [path for path in files if path == name or (name.endswith("/") and path.startswith(name))]
                if not hit:
                    raise HubRefusal(404, f"A file with this name doesn't exist: {name}", "EntryNotFound")
                files = {path: entry for path, entry in files.items() if path not in hit}
            sha = self._record(repo_id, head, message, files | added)
            self.save(replace(repo, branches=repo.branches | {branch: sha}))
            return sha

    def set_ref(self, repo_id: str, kind: str, name: str, revision: str | None) -> None:
        """Create one of `kind` "tags" or "branches" at `revision`, or remove it with None; 409 exists, 404 does not."""
        with self.lock:
            repo = self.find(repo_id)
            assert repo is not None
            refs = dict(getattr(repo, kind))
            if revision is None:
                if refs.pop(name, None) is None:
                    raise HubRefusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            elif name in refs:
                raise HubRefusal(409, f"Reference already exists: {name}")
            elif not REF.fullmatch(name):
                raise HubRefusal(400, f"{name!r} is not a valid name for a reference.")
            else:
                refs[name] = self.resolve(repo, revision)
            self.save(replace(repo, branches=refs) if kind == "branches" else replace(repo, tags=refs))
