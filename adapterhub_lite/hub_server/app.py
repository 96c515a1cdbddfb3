"""The hub as an ASGI application: routes put together, refusals turned into answers."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub_lite.hub_server.hub import Account, Hub
from adapterhub_lite.hub_server.routes import ROUTES, Wire
from adapterhub_lite.hub_server.store import HubRefusal


class RawPath:
    """Route on the undecoded path, so that a branch `a%2Fb` stays one segment; handlers unquote what they take."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on."""
        await self.app(
            dict(scope, path=scope["raw_path"].decode()) if scope["type"] == "http" else scope, receive, send
        )


async def _refused(_: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, HubRefusal)
    headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
    return JSONResponse({"error": str(refusal)}, refusal.status, headers)


def create_app(data: Path, *, tokens: Mapping[str, Account] | None = None, part_bytes: int = 64_000_000) -> FastAPI:
    """The hub over the files in `data`.

    `tokens` maps a token to its account; None lets everybody read and write. Files above `part_bytes` are uploaded
    in parts of that many bytes.
    """
    app, wire = FastAPI(openapi_url=None, redirect_slashes=False), Wire(Hub(data, tokens, part_bytes))
    for method, path, name in ROUTES:
        app.add_api_route(path, getattr(wire, name), methods=[method], response_model=None)
    app.add_exception_handler(HubRefusal, _refused)
    app.add_middleware(RawPath)
    return app
