"""The API of repositories: what the `huggingface_hub` 2.x client asks about models and data sets, one method per request.

What this hub does not have is refused with 501 before anything is written; see `unsupported`.
"""

import html
import re
from dataclasses import replace
from typing import Annotated
from urllib.parse import parse_qs, unquote

import yaml
from fastapi import Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from adapterhub_lite.hub_server.bodies import (
    CardText,
    CommitRequest,
    Copies,
    Duplicate,
    Move,
    NamedRepo,
    NewBranch,
    NewRepo,
    NewTag,
    Preupload,
    Settings,
    Squash,
    ignored_files,
)
from adapterhub_lite.hub_server.hub import Hub, key_of
from adapterhub_lite.hub_server.info import (
    Json,
    describe,
    expanded,
    front_matter,
    last_commits,
    listed,
    matching,
    paged,
    tree,
)
from adapterhub_lite.hub_server.store import Commit, HubRefusal, check_path, repo_key

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".png", ".npz", ".arrow", ".parquet", ".zip", ".gz")
REGULAR_BYTES = 10_000_000
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
REPO = "/api/{kinds}/{ns}/{name}"
# In the order they are matched: method, path, method of `Api`.
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/repos/move", "move"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", "/api/{kinds}", "repositories"),
    ("GET", REPO, "info"),
    ("GET", REPO + "/revision/{rev}", "info"),
    ("GET", REPO + "/auth-check", "auth_check"),
    ("GET", REPO + "/auth-check/write", "auth_check_write"),
    ("PUT", REPO + "/settings", "settings"),
    ("GET", REPO + "/tree/{rev}", "tree"),
    ("GET", REPO + "/tree/{rev}/{path:path}", "tree"),
    ("POST", REPO + "/paths-info/{rev}", "paths_info"),
    ("GET", REPO + "/commits/{rev}", "commits"),
    ("GET", REPO + "/refs", "refs"),
    ("POST", REPO + "/tag/{rev}", "add_tag"),
    ("DELETE", REPO + "/tag/{ref}", "drop_tag"),
    ("POST", REPO + "/branch/{ref}", "add_branch"),
    ("DELETE", REPO + "/branch/{ref}", "drop_branch"),
    ("POST", REPO + "/super-squash/{ref}", "squash"),
    ("POST", REPO + "/duplicate", "duplicate"),
    ("POST", REPO + "/lfs-files/duplicate", "duplicate_files"),
    ("GET", REPO + "/discussions", "discussions"),
    ("POST", REPO + "/preupload/{rev}", "preupload"),
    ("POST", REPO + "/commit/{rev}", "commit"),
)


class Api:
    """The answers, from one hub. Path parameters arrive quoted."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.store = hub, hub.store

    def whoami(self, request: Request) -> Json:
        """Name, role and organisations of the token."""
        account = self.hub.account(request)
        if account is None:
            raise HubRefusal(401, "Invalid username or password.")
        auth = {"accessToken": {"displayName": "token", "role": account.role}}
        orgs = [{"name": org, "type": "org"} for org in account.orgs]
        return {"type": "user", "name": account.name, "fullname": account.name, "orgs": orgs, "auth": auth}

    def _named(self, request: Request, body: NewRepo | NamedRepo) -> str:
        account = self.hub.account(request)
        owner = body.organization or (account.name if account else "user")
        return repo_key(body.type, f"{owner}/{body.name}")

    def create(self, request: Request, body: NewRepo) -> JSONResponse:
        """Create a repository; 409 when it exists."""
        key = self._named(request, body)
        self.hub.require_write(request, key.removeprefix("datasets/"))
        told = {"url": f"{request.base_url}{key}", "name": key.removeprefix("datasets/")}
        if self.store.create(key, body.private or body.visibility == "private"):
            return JSONResponse(told)
        return JSONResponse(told | {"error": f"You already created this {body.type} repo"}, 409)

    def delete(self, request: Request, body: NamedRepo) -> Json:
        """Delete a repository."""
        self.store.delete(self.hub.writable(request, self._named(request, body)).key)
        return {}

    def move(self, request: Request, body: Move) -> Json:
        """Rename a repository, or give it to another owner whom the caller may write for."""
        repo = self.hub.writable(request, repo_key(body.type, body.fromRepo))
        self.hub.require_write(request, body.toRepo)
        self.store.move(repo.key, repo_key(body.type, body.toRepo))
        return {}

    def duplicate(self, request: Request, body: Duplicate) -> JSONResponse:
        """Copy a repository's files, without its history, into a new one."""
        repo = self.hub.open_files(request)
        key = repo_key(repo.kind, body.repository)
        self.hub.require_write(request, body.repository)
        head = self.hub.at(request, repo, "main")
        private = body.private or body.visibility == "private" or (body.visibility is None and repo.private)
        told = {"url": f"{request.base_url}{key}"}
        if self.store.create(key, private, head.files, f"Duplicate from {repo.id}"):
            return JSONResponse(told)
        return JSONResponse(told | {"error": f"A {repo.kind} repository called {body.repository} already exists."}, 409)

    def duplicate_files(self, request: Request, body: Copies) -> Json:
        """Contents lie in one pool, so that there is nothing to copy; only the right to read and write is checked."""
        held = self.store.named_contents(self.hub.open_files(request).key)
        self.hub.writable(request, repo_key(body.target.type, body.target.name))
        missing = [file.sha256 for file in body.files if file.sha256 not in held]
        return {"failed": [{"sha256": sha256, "error": "not in the source repository"} for sha256 in missing]}

    def settings(self, request: Request, body: Settings) -> Json:
        """Change who may see a repository, and whether it is gated."""
        repo = self.hub.writable(request)
        private = repo.private if body.private is None else body.private
        private = body.visibility == "private" if body.visibility else private
        gated = repo.gated if body.gated is None else body.gated or ""
        with self.store.lock:
            self.store.save(replace(self.store.find(repo.key) or repo, private=private, gated=gated))
        return {}

    def validate(self, body: CardText) -> JSONResponse:
        """Check the metadata of a card, as far as this hub can."""
        errors, warnings = [], []
        try:
            card = front_matter(body.content)
            bases, index = card.get("base_model") or [], card.get("model-index") or []
            bases = bases if isinstance(bases, list) else [bases]
            errors = [f'"base_model" {base!r} is not a model id' for base in bases if not MODEL_ID.fullmatch(str(base))]
            if not isinstance(index, list) or not all(isinstance(one, dict) and "name" in one for one in index):
                errors.append('"model-index" is not a list of models, each with its name')
            if not card:
                warnings.append("empty or missing yaml metadata in repo card")
        except yaml.YAMLError as error:
            errors.append(str(error))
        told = {
            kind: [{"message": text.encode("ascii", "backslashreplace").decode()} for text in lines]
            for kind, lines in (("errors", errors), ("warnings", warnings))
        }
        return JSONResponse(told, 400 if errors else 200)

    def repositories(
        self, request: Request, kinds: str, limit: int = 1000, expand: Annotated[list[str] | None, Query()] = None
    ) -> JSONResponse:
        """Repositories of a kind that the caller may see, filtered and in order."""
        if kinds not in ("models", "datasets"):
            raise unsupported(request)
        # One without `main` (a copy of a hub that was cut short) must not hide the others.
        seen = [repo for repo in self.hub.visible(request, kinds[:-1]) if "main" in repo.branches]
        infos = (describe(self.store, repo, self.hub.at(request, repo, "main")) for repo in seen)
        lines = [listed(info, request.query_params, expand or ()) for info in matching(infos, request)]
        return paged(request, lines, limit)

    def info(
        self, request: Request, rev: str = "main", blobs: bool = False, securityStatus: bool = False,  # noqa: N803
        expand: Annotated[list[str] | None, Query()] = None,
    ) -> Json:  # fmt: skip
        """A repository at a revision."""
        if securityStatus:
            raise HubRefusal(501, "This hub scans no files, so that it has no security status.")
        repo = self.hub.readable(request)
        found = describe(self.store, repo, self.hub.at(request, repo, rev), blobs=blobs)
        # Over all commits, as the quota counts; a listing leaves it out, because it would read every commit there is.
        return expanded(found | {"usedStorage": sum(self.store.named_contents(repo.key).values())}, expand or ())

    def auth_check(self, request: Request) -> Json:
        """Whether the caller may read the files."""
        self.hub.open_files(request)
        return {}

    def auth_check_write(self, request: Request) -> Json:
        """Whether the caller may write."""
        self.hub.writable(request)
        return {}

    def tree(
        self, request: Request, rev: str, path: str = "", recursive: bool = False, expand: bool = False
    ) -> JSONResponse:
        """Files and folders, of one level or of all."""
        repo = self.hub.readable(request)
        commit = self.hub.at(request, repo, rev)
        found = tree(commit.files, unquote(path).strip("/"), recursive=recursive)
        return paged(request, self._with_commits(repo.key, commit, found) if expand else found)

    def _with_commits(self, key: str, commit: Commit, items: list[Json]) -> list[Json]:
        newest = last_commits(self.store, key, commit.sha, [item["path"] for item in items])
        return [item | {"lastCommit": newest[item["path"]]} for item in items]

    async def paths_info(self, request: Request, rev: str) -> list[Json]:
        """The files and folders that are asked for."""
        try:
            asked = parse_qs((await request.body()).decode(), max_num_fields=20_000)
        except (UnicodeDecodeError, ValueError) as error:
            raise HubRefusal(400, "The paths are not a form in UTF-8, or there are too many of them.") from error
        paths = {path.strip("/") for path in asked.get("paths", [])}
        repo = self.hub.readable(request)
        commit = self.hub.at(request, repo, rev)
        found = [item for item in tree(commit.files, recursive=True) if item["path"] in paths]
        wants_commits = asked.get("expand", [""])[0].lower() in ("1", "true")
        return await run_in_threadpool(self._with_commits, repo.key, commit, found) if wants_commits else found

    def commits(
        self, request: Request, rev: str, expand: Annotated[list[str] | None, Query(alias="expand[]")] = None
    ) -> JSONResponse:
        """The log, newest first."""
        repo, formatted = self.hub.readable(request), "formatted" in (expand or ())
        lines = [
            {"id": one.sha, "title": one.title, "message": one.description, "date": one.date,
             "authors": [{"user": one.author}]}
            | ({"formatted": {"title": html.escape(one.title), "message": html.escape(one.description)}}
               if formatted else {})
            for one in self.store.log(repo.key, self.hub.at(request, repo, rev).sha)
        ]  # fmt: skip
        return paged(request, lines)

    def refs(self, request: Request) -> Json:
        """Branches and tags."""
        repo = self.hub.readable(request)
        heads = {name: self.hub.at(request, repo, name).sha for name in repo.branches}
        shown = {
            kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for kind, refs in (("heads", heads), ("tags", repo.tags))
        }
        return {"branches": shown["heads"], "tags": shown["tags"], "converts": [], "pullRequests": []}

    def add_tag(self, request: Request, rev: str, body: NewTag) -> Json:
        """Create a tag."""
        self.store.set_ref(self.hub.writable(request).key, "tags", body.tag, unquote(rev))
        return {}

    def drop_tag(self, request: Request, ref: str) -> Json:
        """Delete a tag."""
        self.store.set_ref(self.hub.writable(request).key, "tags", unquote(ref), None)
        return {}

    def add_branch(self, request: Request, ref: str, body: NewBranch | None = None) -> Json:
        """Create a branch."""
        body, repo = body or NewBranch(), self.hub.writable(request)
        start = body.startingPoint or "main"
        self.store.set_ref(repo.key, "branches", unquote(ref), start, replace_it=body.overwrite)
        return {}

    def drop_branch(self, request: Request, ref: str) -> Json:
        """Delete a branch; `main` cannot be deleted."""
        self.store.set_ref(self.hub.writable(request).key, "branches", unquote(ref), None)
        return {}

    def squash(self, request: Request, ref: str, body: Squash | None = None) -> Json:
        """Replace the history of a branch by one commit."""
        repo, account = self.hub.writable(request), self.hub.account(request)
        title = (body.message if body else "") or f"Squash {unquote(ref)}"
        self.store.squash(repo.key, unquote(ref), title, account.name if account else "anonymous")
        return {}

    def discussions(self, request: Request) -> Json:
        """There are none, which is what a listing may say; opening one is refused."""
        self.hub.readable(request)
        return {"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0}

    def preupload(self, request: Request, rev: str, body: Preupload) -> Json:
        """How each file is to be uploaded, what is there of it already, and whether `.gitignore` leaves it out."""
        refuse_pull_requests(request)
        repo = self.hub.writable(request)
        have, told = self.hub.at(request, repo, rev).files, []
        if unquote(rev) not in repo.branches:
            raise HubRefusal(404, f"Invalid rev id: {unquote(rev)} is not a branch.", "RevisionNotFound")
        ignore = have.get(".gitignore")
        patterns = body.gitIgnore
        if patterns is None and ignore and ignore.size <= REGULAR_BYTES:
            patterns = self.store.blob(ignore.sha256).read_text(errors="replace")
        for file in body.files:
            check_path(file.path)
        ignored = set(ignored_files(patterns or "", [file.path for file in body.files]))
        for file in body.files:
            large = file.path.endswith(LARGE_SUFFIXES) or file.size > REGULAR_BYTES
            leave_out = file.path in ignored
            mode: Json = {"path": file.path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": leave_out}
            old = have.get(file.path)
            told.append(mode | ({"oid": old.sha256 if old.lfs else old.oid} if old else {}))
            if not leave_out and self.store.quota_bytes is not None and file.size > self.store.quota_bytes:
                # What is there already counts when the contents are known, at the commit.
                raise HubRefusal(
                    413, f"{file.path} is larger than the {self.store.quota_bytes:,} bytes this hub allows."
                )
        return {"files": told}

    async def commit(self, request: Request, rev: str) -> Json:
        """Apply a commit; 412 when its parent is not the head."""
        refuse_pull_requests(request)
        await run_in_threadpool(self.hub.writable, request)  # before a body of up to 256 MB is taken in
        asked = CommitRequest.parse(await request.body())
        return await run_in_threadpool(self._apply, request, unquote(rev), asked)

    def _apply(self, request: Request, branch: str, asked: CommitRequest) -> Json:
        repo, account = self.hub.writable(request), self.hub.account(request)
        added = {path: self.store.regular(content) for path, content in asked.regular.items()}
        added |= {path: self.hub.entry(sha256) for path, sha256 in asked.large.items()}
        message = (asked.title, asked.description, account.name if account else "anonymous")
        sha = self.store.add_commit(repo.key, branch, asked.parent, message, added, asked.gone)
        return {"success": True, "commitOid": sha, "commitUrl": f"{request.base_url}{repo.key}/commit/{sha}",
                "hookOutput": ""}  # fmt: skip


def refuse_pull_requests(request: Request) -> None:
    """Pull requests are refused before anything is uploaded, because a commit for one must never reach `main`."""
    if request.query_params.get("create_pr", "").lower() in ("1", "true"):
        raise HubRefusal(
            501, "This hub has no pull requests. Commit to a branch instead: create_branch, then revision=."
        )


def unsupported(request: Request) -> HubRefusal:
    """The refusal of a request that this hub does not answer."""
    what = unquote(request.url.path)
    return HubRefusal(
        501, f"This hub does not support {request.method} {what:.200}. See 'A hub of your own' in the docs."
    )


def repository_or_unsupported(hub: Hub, request: Request) -> HubRefusal:
    """For an address of the API that no route answers: a repository that is not there, or an operation that is not."""
    parts = unquote(request.url.path).strip("/").split("/")
    if parts[1] in ("models", "datasets") and len(parts) > 2:
        key = repo_key(parts[1][:-1], "/".join(parts[2:4]))
        try:
            hub.readable(request, key)
        except HubRefusal as refusal:
            # `gpt2` and the like: the real hub has ids without an owner, this one has none.
            return refusal if refusal.code else HubRefusal(404, "Repository not found", "RepoNotFound")
    return unsupported(request)


__all__ = ["ROUTES", "Api", "key_of", "repository_or_unsupported", "unsupported"]
