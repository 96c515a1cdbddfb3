"""The wire: what the `huggingface_hub` 2.x client asks of a hub with model repositories, one method a request."""

import base64
import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from fastapi import Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from adapterhub_lite.hub_server.hub import Hub, described, front_matter
from adapterhub_lite.hub_server.store import Commit, Entry, HubRefusal

Json = dict[str, Any]
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".png", ".npz", ".arrow", ".parquet")
REGULAR_BYTES = 10_000_000
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
REPO = "/api/models/{ns}/{name}"
# In the order they are matched: method, path, method of `Wire`.
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("DELETE", "/api/repos/delete", "delete"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", "/api/models", "models"),
    ("GET", REPO, "info"),
    ("GET", REPO + "/revision/{rev}", "info"),
    ("PUT", REPO + "/settings", "settings"),
    ("GET", REPO + "/tree/{rev}", "tree"),
    ("GET", REPO + "/tree/{rev}/{path:path}", "tree"),
    ("POST", REPO + "/paths-info/{rev}", "paths_info"),
    ("GET", REPO + "/commits/{rev}", "commits"),
    ("GET", REPO + "/refs", "refs"),
    ("POST", REPO + "/tag/{rev}", "add_tag"),
    ("POST", REPO + "/branch/{ref}", "add_branch"),
    ("DELETE", REPO + "/{kind}/{ref}", "drop_ref"),
    ("POST", REPO + "/preupload/{rev}", "preupload"),
    ("POST", REPO + "/commit/{rev}", "commit"),
    ("GET", REPO + "/xet-{mode}-token/{rev}", "xet_token"),
    ("POST", "/{ns}/{name}.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/{ticket}", "upload"),
    ("PUT", "/lfs/{ticket}/{part}", "upload"),
    ("POST", "/lfs/{ticket}", "complete"),
    ("POST", "/lfs/{ticket}/verify", "verify"),
    ("GET", "/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
    ("HEAD", "/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
)


class Wire:
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

    def _named(self, request: Request, body: Json) -> str:
        account = self.hub.account(request)
        return f"{body.get('organization') or (account.name if account else 'user')}/{body['name']}"

    def create(self, request: Request, body: Json) -> JSONResponse:
        """Create a repository; 409 when it exists."""
        repo_id = self._named(request, body)
        self.hub.require_write(request, repo_id)
        if body.get("type", "model") != "model":
            raise HubRefusal(400, "This hub holds model repositories only.")
        told = {"url": f"{request.base_url}{repo_id}", "name": repo_id}
        if self.store.create(repo_id, body.get("visibility") == "private"):
            return JSONResponse(told)
        return JSONResponse(told | {"error": "You already created this model repo"}, 409)

    def delete(self, request: Request, body: Json) -> Json:
        """Delete a repository."""
        self.store.delete(self.hub.writable(request, self._named(request, body)).id)
        return {}

    def settings(self, request: Request, body: Json) -> Json:
        """Change who may see a repository, and whether it is gated."""
        repo = self.hub.writable(request)
        private = body.get("visibility") == "private" if "visibility" in body else body.get("private", repo.private)
        self.store.save(replace(repo, private=private, gated=body.get("gated", repo.gated) or ""))
        return {}

    def validate(self, body: Json) -> JSONResponse:
        """Check the metadata of a card, as far as this hub can."""
        try:
            bases = front_matter(body["content"]).get("base_model") or []
            bases = bases if isinstance(bases, list) else [bases]
            errors = [f'"base_model" {base!r} is not a model id' for base in bases if not MODEL_ID.fullmatch(str(base))]
        except yaml.YAMLError as error:
            errors = [str(error)]
        return JSONResponse({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)

    def models(self, request: Request, author: str = "", search: str = "", limit: int = 1000) -> list[Json]:
        """Repositories that the caller may see, filtered."""
        tags, account = set(request.query_params.getlist("filter")), self.hub.account(request)
        seen = [repo for repo in self.store.repos() if not repo.private or self.hub.owns(account, repo.id)]
        named = [repo for repo in seen if repo.id.startswith(f"{author}/" if author else "") and search in repo.id]
        found = [self.hub.info(repo, self.hub.at(request, repo, "main")) for repo in named]
        return [info for info in found if tags <= set(info["tags"])][:limit]

    def info(self, request: Request, rev: str = "main") -> Json:
        """A repository at a revision."""
        repo = self.hub.readable(request)
        return self.hub.info(repo, self.hub.at(request, repo, rev))

    def _commit(self, request: Request, rev: str) -> Commit:
        return self.hub.at(request, self.hub.readable(request), rev)

    def tree(self, request: Request, rev: str, path: str = "", recursive: bool = False) -> list[Json]:
        """Files and folders, of one level or of all."""
        top = f"{unquote(path)}/" if path else ""
        shown = [item for item in _listing(self._commit(request, rev).files) if item["path"].startswith(top)]
        return [item for item in shown if recursive or "/" not in item["path"][len(top) :]]

    async def paths_info(self, request: Request, rev: str) -> list[Json]:
        """The files and folders that are asked for."""
        wanted = parse_qs((await request.body()).decode()).get("paths", [])
        return [item for item in _listing(self._commit(request, rev).files) if item["path"] in wanted]

    def commits(self, request: Request, rev: str) -> list[Json]:
        """The log, newest first."""
        repo = self.hub.readable(request)
        found = [self.hub.at(request, repo, rev)]
        while found[-1].parent:
            found.append(self.store.commit(repo.id, found[-1].parent))
        said = [{"id": one.sha, "title": one.title, "message": one.description, "date": one.date} for one in found]
        return [line | {"authors": [{"user": one.author}]} for line, one in zip(said, found, strict=True)]

    def refs(self, request: Request) -> Json:
        """Branches and tags."""
        repo = self.hub.readable(request)
        heads = {name: self.hub.at(request, repo, name).sha for name in repo.branches}
        shown = {
            kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for kind, refs in (("heads", heads), ("tags", repo.tags))
        }
        return {"branches": shown["heads"], "tags": shown["tags"], "converts": [], "pullRequests": []}

    def add_tag(self, request: Request, rev: str, body: Json) -> Json:
        """Create a tag."""
        self.store.set_ref(self.hub.writable(request).id, "tags", body["tag"], unquote(rev))
        return {}

    def add_branch(self, request: Request, ref: str, body: Json) -> Json:
        """Create a branch."""
        repo = self.hub.writable(request)
        self.store.set_ref(repo.id, "branches", unquote(ref), body.get("startingPoint") or "main")
        return {}

    def drop_ref(self, request: Request, kind: str, ref: str) -> Json:
        """Delete a tag or a branch."""
        refs = "branches" if kind == "branch" else "tags"
        self.store.set_ref(self.hub.writable(request).id, refs, unquote(ref), None)
        return {}

    def preupload(self, request: Request, rev: str, body: Json) -> Json:
        """How each file is to be uploaded, and what is there of it already."""
        have, told = self.hub.at(request, self.hub.writable(request), rev).files, []
        for file in body["files"]:
            large = file["path"].endswith(LARGE_SUFFIXES) or file["size"] > REGULAR_BYTES
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            old = have.get(file["path"])
            told.append(mode | ({"oid": old.sha256 if old.lfs else old.oid} if old else {}))
        return {"files": told}

    async def commit(self, request: Request, rev: str) -> Json:
        """Apply a commit; 412 when its parent is not the head."""
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        return await run_in_threadpool(self._apply, request, unquote(rev), lines)

    def _apply(self, request: Request, branch: str, lines: list[Json]) -> Json:
        repo, account = self.hub.writable(request), self.hub.account(request)
        added, gone, header = {}, [], lines[0]["value"]
        for key, value in ((line["key"], line["value"]) for line in lines[1:]):
            if ".." in Path(value["path"]).parts or value["path"].startswith("/"):
                raise HubRefusal(400, f"{value['path']!r} leaves the repository.")
            if key == "file":
                added[value["path"]] = self.store.regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                added[value["path"]] = self.hub.entry(value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                gone.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
            else:
                raise HubRefusal(400, f"{key!r} is not an operation of this hub.")
        message = (header["summary"], header.get("description", ""), account.name if account else "anonymous")
        sha = self.store.add_commit(repo.id, branch, header.get("parentCommit") or "", message, added, gone)
        return {"success": True, "commitOid": sha, "commitUrl": f"/{repo.id}/commit/{sha}", "hookOutput": ""}

    def xet_token(self, request: Request, mode: str) -> JSONResponse:
        """Where this client may write or read Xet contents."""
        (self.hub.writable if mode == "write" else self.hub.readable)(request)
        address, expires = self.hub.xet.open_lane(mode == "write"), int(time.time()) + 86400
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": address, "accessToken": "none", "exp": expires}, headers=headers)

    def batch(self, request: Request, body: Json) -> Json:
        """Upload addresses for the objects that are not here yet; large ones in parts."""
        self.hub.writable(request)
        objects = [self._lfs_object(str(request.base_url), asked) for asked in body["objects"]]
        return {"transfer": "basic", "objects": objects}

    def _lfs_object(self, host: str, asked: Json) -> Json:
        oid, size, header = asked["oid"], asked["size"], {}
        if not re.fullmatch(r"[0-9a-f]{64}", oid):
            return {"oid": oid, "size": size, "error": {"code": 422, "message": "oid is not a sha256"}}
        if self.store.blob(oid).exists():
            return {"oid": oid, "size": size}
        ticket = uuid.uuid4().hex
        self.hub.tickets[ticket] = (oid, size)
        href, part_bytes = f"{host}lfs/{ticket}", self.hub.part_bytes
        if size > part_bytes:
            parts = {f"{part:05}": f"{href}/{part}" for part in range(1, -(-size // part_bytes) + 1)}
            header = {"chunk_size": str(part_bytes)} | parts
        actions = {"upload": {"href": href, "header": header}, "verify": {"href": f"{href}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    async def upload(self, request: Request, ticket: str, part: int = 0) -> JSONResponse:
        """Take in the bytes of an object, or of one part of it."""
        sha256, _ = self.hub.ticket(ticket)
        landing = self.store.incoming / f"{ticket}.{part:05}"
        with landing.open("wb") as stream:
            async for chunk in request.stream():
                stream.write(chunk)
        if not part:
            await run_in_threadpool(self.store.admit, landing, sha256)
        return JSONResponse({}, headers={"ETag": f'"{part}"'})

    def complete(self, ticket: str) -> Json:
        """Join the parts."""
        sha256, _ = self.hub.ticket(ticket)
        whole = self.store.incoming / ticket
        with whole.open("wb") as stream:
            for part in sorted(self.store.incoming.glob(f"{ticket}.*")):
                stream.write(part.read_bytes())
        self.store.admit(whole, sha256)
        return {}

    def verify(self, ticket: str) -> Json:
        """Check that an upload arrived whole."""
        sha256, size = self.hub.ticket(ticket)
        if not self.store.blob(sha256).exists() or self.store.blob(sha256).stat().st_size != size:
            raise HubRefusal(400, "The upload is missing or of another size.")
        return {}

    def resolve(self, request: Request, rev: str, path: str) -> FileResponse:
        """The bytes of a file, or a range of them."""
        repo, account = self.hub.readable(request), self.hub.account(request)
        if repo.gated and not self.hub.owns(account, repo.id):
            raise HubRefusal(403 if account else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        commit = self.hub.at(request, repo, rev)
        file = commit.files.get(unquote(path))
        if file is None:
            raise HubRefusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.xet:
            route = f"{request.base_url}api/models/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{route}>; rel="xet-auth"'}
        return FileResponse(self.store.blob(file.sha256), headers=headers, media_type="application/octet-stream")


def _listing(files: dict[str, Entry]) -> Iterator[Json]:
    folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
    yield from ({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders))
    yield from ({"type": "file", "path": path, "oid": file.oid} | described(file) for path, file in files.items())
