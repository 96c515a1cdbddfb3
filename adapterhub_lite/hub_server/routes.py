"""The routes that the `huggingface_hub` 2.x client uses for model repositories."""

import base64
import json
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from adapterhub_lite.hub_server.app import Hub, described, front_matter
from adapterhub_lite.hub_server.store import Commit, HubRefusal, Repo

Json = dict[str, Any]
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".png", ".npz", ".arrow", ".parquet")
REGULAR_BYTES = 10_000_000
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def account_routes(hub: Hub) -> APIRouter:
    """Who am I; create, change, check, list and delete repositories."""
    router = APIRouter()

    def named(request: Request, body: Json) -> str:
        account = hub.account(request)
        return f"{body.get('organization') or (account.name if account else 'user')}/{body['name']}"

    @router.get("/api/whoami-v2")
    def whoami(request: Request) -> Json:
        account = hub.account(request)
        if account is None:
            raise HubRefusal(401, "Invalid username or password.")
        auth = {"accessToken": {"displayName": "token", "role": account.role}}
        orgs = [{"name": org, "type": "org"} for org in account.orgs]
        return {"type": "user", "name": account.name, "fullname": account.name, "orgs": orgs, "auth": auth}

    @router.post("/api/repos/create")
    def create(request: Request, body: Json) -> JSONResponse:
        repo_id = named(request, body)
        hub.require_write(request, repo_id)
        if body.get("type", "model") != "model":
            raise HubRefusal(400, "This hub holds model repositories only.")
        fresh = hub.store.create(repo_id, body.get("visibility") == "private")
        told = {"url": f"{request.base_url}{repo_id}", "name": repo_id}
        return JSONResponse(
            told if fresh else told | {"error": "You already created this model repo"}, 200 if fresh else 409
        )

    @router.delete("/api/repos/delete")
    def delete(request: Request, body: Json) -> Json:
        hub.store.delete(hub.writable(request, *named(request, body).split("/", 1)).id)
        return {}

    @router.put("/api/models/{ns}/{name}/settings")
    def settings(request: Request, ns: str, name: str, body: Json) -> Json:
        repo = hub.writable(request, ns, name)
        private = body.get("visibility") == "private" if "visibility" in body else body.get("private", repo.private)
        hub.store.save(replace(repo, private=private, gated=body.get("gated", repo.gated) or ""))
        return {}

    @router.post("/api/validate-yaml")
    def validate(body: Json) -> JSONResponse:
        try:
            bases = front_matter(body["content"]).get("base_model") or []
            bases = [bases] if isinstance(bases, str) else bases
            errors = [f'"base_model" {base!r} is not a model id' for base in bases if not MODEL_ID.fullmatch(str(base))]
        except yaml.YAMLError as error:
            errors = [str(error)]
        return JSONResponse({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)

    @router.get("/api/models")
    def models(request: Request, author: str = "", search: str = "", limit: int = 1000) -> list[Json]:
        wanted, account = request.query_params.getlist("filter"), hub.account(request)
        seen = [repo for repo in hub.store.repos() if not repo.private or hub.owns(account, repo.id)]
        named = [repo for repo in seen if repo.id.startswith(f"{author}/" if author else "") and search in repo.id]
        found = [hub.info(repo, hub.at(request, repo, "main")) for repo in named]
        return [info for info in found if set(wanted) <= set(info["tags"])][:limit]

    return router


def repository_routes(hub: Hub) -> APIRouter:
    """Info, listings, refs and commits of one repository."""
    router = APIRouter(prefix="/api/models/{ns}/{name}")

    def listing(commit: Commit, paths: Iterable[str]) -> list[Json]:
        files = [(path, commit.files[path]) for path in paths if path in commit.files]
        folders = {str(parent) for path, _ in files for parent in Path(path).parents if str(parent) != "."}
        shown: list[Json] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)
        ]
        return shown + [{"type": "file", "path": path, "oid": file.oid} | described(file) for path, file in files]

    @router.get("")
    @router.get("/revision/{rev}")
    def info(request: Request, ns: str, name: str, rev: str = "main") -> Json:
        repo = hub.readable(request, ns, name)
        return hub.info(repo, hub.at(request, repo, rev))

    @router.get("/tree/{rev}")
    @router.get("/tree/{rev}/{path:path}")
    def tree(request: Request, ns: str, name: str, rev: str, path: str = "", recursive: bool = False) -> list[Json]:
        commit = hub.at(request, hub.readable(request, ns, name), rev)
        top = f"{unquote(path)}/" if path else ""
        shown = [item for item in listing(commit, commit.files) if item["path"].startswith(top)]
        return [item for item in shown if recursive or "/" not in item["path"][len(top) :]]

    @router.post("/paths-info/{rev}")
    async def paths_info(request: Request, ns: str, name: str, rev: str) -> list[Json]:
        form = (await request.body()).decode()
        wanted = [unquote(pair[6:].replace("+", " ")) for pair in form.split("&") if pair.startswith("paths=")]
        commit = hub.at(request, hub.readable(request, ns, name), rev)
        return [item for item in listing(commit, commit.files) if item["path"] in wanted]

    @router.get("/commits/{rev}")
    def commits(request: Request, ns: str, name: str, rev: str) -> list[Json]:
        repo = hub.readable(request, ns, name)
        found = [hub.at(request, repo, rev)]
        while found[-1].parent:
            found.append(hub.store.commit(repo.id, found[-1].parent))
        return [{"id": commit.sha, "title": commit.title, "message": commit.description, "date": commit.date,
                 "authors": [{"user": commit.author}]} for commit in found]  # fmt: skip

    @router.get("/refs")
    def refs(request: Request, ns: str, name: str) -> Json:
        repo = hub.readable(request, ns, name)
        heads = [
            {"name": b, "ref": f"refs/heads/{b}", "targetCommit": hub.at(request, repo, b).sha} for b in repo.branches
        ]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()]
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": []}

    @router.post("/tag/{at}")
    def add_tag(request: Request, ns: str, name: str, at: str, body: Json) -> Json:
        hub.store.set_ref(hub.writable(request, ns, name).id, "tags", body["tag"], unquote(at))
        return {}

    @router.post("/branch/{branch}")
    def add_branch(request: Request, ns: str, name: str, branch: str, body: Json) -> Json:
        start = body.get("startingPoint") or "main"
        hub.store.set_ref(hub.writable(request, ns, name).id, "branches", unquote(branch), start)
        return {}

    @router.delete("/{kind}/{ref}")
    def drop_ref(request: Request, ns: str, name: str, kind: str, ref: str) -> Json:
        repo = hub.writable(request, ns, name)
        hub.store.set_ref(repo.id, "branches" if kind == "branch" else "tags", unquote(ref), None)
        return {}

    @router.post("/preupload/{rev}")
    def preupload(request: Request, ns: str, name: str, rev: str, body: Json) -> Json:
        have = hub.at(request, hub.writable(request, ns, name), rev).files
        told = []
        for file in body["files"]:
            large = file["path"].endswith(LARGE_SUFFIXES) or file["size"] > REGULAR_BYTES
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            old = have.get(file["path"])
            told.append(mode | ({"oid": old.sha256 if old.lfs else old.oid} if old else {}))
        return {"files": told}

    @router.post("/commit/{rev}")
    async def commit(request: Request, ns: str, name: str, rev: str) -> Json:
        repo = hub.writable(request, ns, name)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        account = hub.account(request)
        return await run_in_threadpool(
            _commit, hub, repo, unquote(rev), lines, account.name if account else "anonymous"
        )

    return router


def _commit(hub: Hub, repo: Repo, branch: str, lines: list[Json], author: str) -> Json:
    added, gone, header = {}, [], lines[0]["value"]
    for key, value in ((line["key"], line["value"]) for line in lines[1:]):
        parts = Path(value["path"]).parts
        if ".." in parts or value["path"].startswith("/"):
            raise HubRefusal(400, f"{value['path']!r} leaves the repository.")
        if key == "file":
            added[value["path"]] = hub.store.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            added[value["path"]] = hub.entry(value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            gone.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
        else:
            raise HubRefusal(400, f"{key!r} is not an operation of this hub.")
    message = (header["summary"], header.get("description", ""), author)
    sha = hub.store.add_commit(repo.id, branch, header.get("parentCommit") or "", message, added, gone)
    return {"success": True, "commitOid": sha, "commitUrl": f"/{repo.id}/commit/{sha}", "hookOutput": ""}


def content_routes(hub: Hub) -> APIRouter:
    """Bytes: uploads (LFS basic and multipart, Xet tokens) and downloads with range."""
    router = APIRouter()

    @router.post("/{ns}/{name}.git/info/lfs/objects/batch")
    def batch(request: Request, ns: str, name: str, body: Json) -> Json:
        hub.writable(request, ns, name)
        return {
            "transfer": "basic",
            "objects": [_lfs_object(hub, str(request.base_url), obj) for obj in body["objects"]],
        }

    @router.put("/lfs/{ticket}")
    @router.put("/lfs/{ticket}/{part}")
    async def put(request: Request, ticket: str, part: int = 0) -> JSONResponse:
        sha256, _ = hub.ticket(ticket)
        landing = hub.store.incoming / f"{ticket}.{part:05}"
        with landing.open("wb") as stream:
            async for chunk in request.stream():
                stream.write(chunk)
        if not part:
            await run_in_threadpool(hub.store.admit, landing, sha256)
        return JSONResponse({}, headers={"ETag": f'"{part}"'})

    @router.post("/lfs/{ticket}")
    def complete(ticket: str, body: Json) -> Json:
        sha256, _ = hub.ticket(ticket)
        whole = hub.store.incoming / ticket
        with whole.open("wb") as stream:
            for part in sorted(hub.store.incoming.glob(f"{ticket}.*")):
                stream.write(part.read_bytes())
                part.unlink()
        hub.store.admit(whole, sha256)
        return {}

    @router.post("/lfs/{ticket}/verify")
    def verify(ticket: str) -> Json:
        sha256, size = hub.ticket(ticket)
        if not hub.store.blob(sha256).exists() or hub.store.blob(sha256).stat().st_size != size:
            raise HubRefusal(400, "The upload is missing or of another size.")
        return {}

    @router.get("/api/models/{ns}/{name}/xet-{mode}-token/{rev}")
    def xet_token(request: Request, ns: str, name: str, mode: str) -> JSONResponse:
        (hub.writable if mode == "write" else hub.readable)(request, ns, name)
        address, expires = hub.xet.open_lane(mode == "write"), int(time.time()) + 86400
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": address, "accessToken": "none", "exp": expires}, headers=headers)

    @router.api_route("/{ns}/{name}/resolve/{rev}/{path:path}", methods=["GET", "HEAD"])
    def resolve(request: Request, ns: str, name: str, rev: str, path: str) -> FileResponse:
        repo = hub.readable(request, ns, name)
        if repo.gated and not hub.owns(hub.account(request), repo.id):
            raise HubRefusal(
                403 if hub.account(request) else 401, f"Access to model {repo.id} is restricted.", "GatedRepo"
            )
        commit = hub.at(request, repo, rev)
        file = commit.files.get(unquote(path))
        if file is None:
            raise HubRefusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.xet:
            route = f"{request.base_url}api/models/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{route}>; rel="xet-auth"'}
        return FileResponse(hub.store.blob(file.sha256), headers=headers, media_type="application/octet-stream")

    return router


def _lfs_object(hub: Hub, host: str, asked: Json) -> Json:
    answer = {"oid": asked["oid"], "size": asked["size"]}
    if not re.fullmatch(r"[0-9a-f]{64}", asked["oid"]):
        return answer | {"error": {"code": 422, "message": "oid is not a sha256"}}
    if hub.store.blob(asked["oid"]).exists():
        return answer
    ticket, header = uuid.uuid4().hex, {}
    hub.tickets[ticket] = (asked["oid"], asked["size"])
    href = f"{host}lfs/{ticket}"
    if asked["size"] > hub.part_bytes:
        count = -(-asked["size"] // hub.part_bytes)
        header = {"chunk_size": str(hub.part_bytes)} | {f"{part:05}": f"{href}/{part}" for part in range(1, count + 1)}
    return answer | {"actions": {"upload": {"href": href, "header": header}, "verify": {"href": f"{href}/verify"}}}
