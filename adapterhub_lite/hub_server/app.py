"""The hub as an ASGI application: routes put together, refusals and renames turned into answers."""

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.hub_server.bodies import described
from adapterhub_lite.hub_server.hub import Account, Hub, MovedError
from adapterhub_lite.hub_server.page import PAGE_ROUTES, Pages, error_page
from adapterhub_lite.hub_server.routes import ROUTES, Api, repository_or_unsupported, unsupported
from adapterhub_lite.hub_server.store import HubRefusal
from adapterhub_lite.hub_server.transfer import TRANSFER_ROUTES, Transfer

# A commit carries its small files inside; an upload is bounded by what was announced for it.
MAX_COMMIT_BYTES, MAX_BODY_BYTES = 256 << 20, 16 << 20
COMMIT_PATH = re.compile(rb"/api/[^/]+/[^/]+/[^/]+/commit/[^/]+")


class RawPath:
    """Route on the undecoded path, so that a branch `a%2Fb` stays one segment, and bound what a body may hold.

    Handlers unquote what they take.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received, path = 0, scope["raw_path"]
        room = MAX_COMMIT_BYTES if COMMIT_PATH.fullmatch(path) else MAX_BODY_BYTES

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > room and not (scope["method"] == "PUT" and path.startswith(b"/lfs/")):
                # The framework lets this one class through while it reads a body.
                raise HTTPException(413, f"This request may carry {room:,} bytes; send fewer files at a time.")
            return message

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The client puts it into its errors.
                name = (b"x-request-id", uuid.uuid4().hex.encode())
                message = {**message, "headers": [*message.get("headers", ()), name]}
            await send(message)

        await self.app(dict(scope, path=path.decode("latin-1")), bounded, numbered)


def create_app(
    data: Path,
    *,
    tokens: Mapping[str, Account] | None = None,
    part_bytes: int = 64_000_000,
    quota_bytes: int | None = None,
) -> FastAPI:
    """The hub over the files in `data`.

    `tokens` maps a token to its account; None lets everybody read and write. Files above `part_bytes` are uploaded
    in parts of that many bytes. `quota_bytes` bounds each repository, over all its commits.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    hub = Hub(data, tokens, part_bytes, quota_bytes)
    for routes, target in ((ROUTES, Api(hub)), (TRANSFER_ROUTES, Transfer(hub)), (PAGE_ROUTES, Pages(hub))):
        for method, path, name in routes:
            app.add_api_route(path, getattr(target, name), methods=[method], response_model=None)

    @app.api_route("/{rest:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], response_model=None)
    def otherwise(request: Request) -> Response:
        """Whatever no route answers."""
        parts = unquote(request.url.path).strip("/").split("/")
        if parts[0] == "api" and len(parts) > 1:
            raise repository_or_unsupported(hub, request)
        if "resolve" in parts or ".git" in request.url.path:
            raise HubRefusal(404, "Repository not found", "RepoNotFound")
        raise HubRefusal(404, "There is no such page.") if request.method in ("GET", "HEAD") else unsupported(request)

    add_refusals(app)
    app.add_middleware(RawPath)
    return app


def add_refusals(app: FastAPI) -> None:
    """Turn refusals, malformed requests and moved repositories into answers."""

    @app.exception_handler(HubRefusal)
    async def refused(request: Request, refusal: HubRefusal) -> Response:
        plain = re.sub(r"[\x00-\x1f\x7f]+", " ", str(refusal)).strip()  # what a header may hold
        text = plain.encode("ascii", "backslashreplace").decode()
        shown = str(refusal).encode(errors="backslashreplace").decode()  # half of a surrogate pair is no UTF-8
        headers = {"X-Error-Message": text} | ({"X-Error-Code": refusal.code} if refusal.code else {})
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(error_page(shown), refusal.status, headers)
        return JSONResponse({"error": shown}, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def stopped(request: Request, error: HTTPException) -> Response:
        return await refused(request, HubRefusal(error.status_code, error.detail))

    @app.exception_handler(MovedError)
    async def moved(request: Request, move: MovedError) -> Response:
        # Relative, because the client follows no other redirect when it asks for a file's metadata.
        path = request.scope["path"].replace(f"/{move.old}", f"/{move.new}", 1)
        if path == request.scope["path"]:  # written with escapes that no client of ours uses
            return await refused(request, HubRefusal(404, "Repository not found", "RepoNotFound"))
        query = request.scope["query_string"].decode("latin-1")
        return RedirectResponse(f"{path}?{query}" if query else path, 307)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def malformed(request: Request, error: RequestValidationError | ValidationError) -> Response:
        if isinstance(error, ValidationError):
            return await refused(request, HubRefusal(400, f"The request is malformed: {described(error)}."))
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await refused(request, HubRefusal(400, f"The request is malformed: {where}: {first['msg']}."))
