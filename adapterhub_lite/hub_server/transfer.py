"""Bytes up and down: LFS uploads whole or in parts, Xet tokens, and downloads with ranges."""

import re
import shutil
import time
from urllib.parse import unquote

from fastapi import Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.concurrency import run_in_threadpool

from adapterhub_lite.hub_server.bodies import LfsBatch, LfsObject
from adapterhub_lite.hub_server.hub import Hub
from adapterhub_lite.hub_server.info import Json
from adapterhub_lite.hub_server.store import HubRefusal

# Each has an address in the answer; of 64 MB, these are 1.28 TB.
MAX_PARTS = 20_000
# In the order they are matched: method, path, method of `Transfer`.
TRANSFER_ROUTES = (
    ("GET", "/api/{kinds}/{ns}/{name}/xet-{mode}-token/{rev}", "xet_token"),
    ("POST", "/{kinds}/{ns}/{name}.git/info/lfs/objects/batch", "batch"),
    ("POST", "/{ns}/{name}.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/{ticket}", "upload"),
    ("PUT", "/lfs/{ticket}/{part}", "upload"),
    ("POST", "/lfs/{ticket}", "complete"),
    ("POST", "/lfs/{ticket}/verify", "verify"),
    ("GET", "/{kinds}/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
    ("HEAD", "/{kinds}/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
    ("GET", "/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
    ("HEAD", "/{ns}/{name}/resolve/{rev}/{path:path}", "resolve"),
)


class Transfer:
    """The answers, from one hub. Path parameters arrive quoted."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.store = hub, hub.store

    def xet_token(self, request: Request, mode: str) -> JSONResponse:
        """Where this client may write or read Xet contents."""
        (self.hub.writable if mode == "write" else self.hub.open_files)(request)
        address, expires = self.hub.xet.open_lane(mode == "write"), int(time.time()) + 86400
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "none", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": address, "accessToken": "none", "exp": expires}, headers=headers)

    def batch(self, request: Request, body: LfsBatch) -> Json:
        """Upload addresses for the objects that are not here yet; large ones in parts."""
        repo = self.hub.writable(request)
        self.store.check_quota(repo.key, {asked.oid: asked.size for asked in body.objects})
        if sum(-(-asked.size // self.hub.part_bytes) for asked in body.objects) > MAX_PARTS:
            raise HubRefusal(413, f"One request may announce {MAX_PARTS:,} parts of {self.hub.part_bytes:,} bytes.")
        return {"transfer": "basic", "objects": [self._object(str(request.base_url), asked) for asked in body.objects]}

    def _object(self, host: str, asked: LfsObject) -> Json:
        told: Json = {"oid": asked.oid, "size": asked.size}
        if not re.fullmatch(r"[0-9a-f]{64}", asked.oid):
            return told | {"error": {"code": 422, "message": "oid is not a sha256"}}
        if self.store.blob(asked.oid).exists():
            return told
        header: dict[str, str] = {}
        href, part_bytes = f"{host}lfs/{self.hub.issue_ticket(asked.oid, asked.size)}", self.hub.part_bytes
        if asked.size > part_bytes:
            parts = {f"{part:05}": f"{href}/{part}" for part in range(1, -(-asked.size // part_bytes) + 1)}
            header = {"chunk_size": str(part_bytes)} | parts
        return told | {"actions": {"upload": {"href": href, "header": header}, "verify": {"href": f"{href}/verify"}}}

    async def upload(self, request: Request, ticket: str, part: int = 0) -> JSONResponse:
        """Take in the bytes of an object, or of one part of it; never more than was announced."""
        sha256, size = self.hub.ticket(ticket)
        if not 0 <= part <= -(-size // self.hub.part_bytes):
            raise HubRefusal(400, f"There is no part {part} of an upload of {size:,} bytes.")
        landing, room = self.store.incoming / f"{ticket}.{part:05}", min(size, self.hub.part_bytes) if part else size
        with landing.open("wb") as stream:
            async for chunk in request.stream():
                room -= len(chunk)
                if room < 0:
                    landing.unlink()
                    raise HubRefusal(413, f"The upload is larger than the {size:,} bytes that were announced.")
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
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, stream, 1 << 20)
                part.unlink()
        self.store.admit(whole, sha256)
        return {}

    def verify(self, ticket: str) -> Json:
        """Check that an upload arrived whole."""
        sha256, size = self.hub.ticket(ticket)
        if not self.store.blob(sha256).exists() or self.store.blob(sha256).stat().st_size != size:
            raise HubRefusal(400, "The upload is missing or of another size.")
        return {}

    def resolve(self, request: Request, rev: str, path: str) -> FileResponse:
        """The bytes of a file, or a range of them, streamed from disk."""
        repo = self.hub.open_files(request)
        commit = self.hub.at(request, repo, rev)
        file = commit.files.get(unquote(path))
        if file is None:
            raise HubRefusal(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"',
                   "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"}  # fmt: skip
        if file.xet:
            route = f"{request.base_url}api/{repo.kind}s/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": file.xet, "Link": f'<{route}>; rel="xet-auth"'}
        return FileResponse(self.store.blob(file.sha256), headers=headers, media_type="application/octet-stream")
