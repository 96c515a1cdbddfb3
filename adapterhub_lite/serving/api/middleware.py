"""What stands before every handler: who is asking, and how large the body may be. Nothing is read of a stranger's body."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.serving.api.auth import KeyRing
from adapterhub_lite.serving.api.errors import ApiRefusal, error_response


class Authenticate:
    """Puts the caller into the request's state, or refuses with 401 before anything of the body is read.

    `public` are the paths that need no key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, public: Collection[str]) -> None:
        self.app, self.keys, self.public = app, keys, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request whose caller is known."""
        if scope["type"] != "http" or scope["path"] in self.public:
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("authorization")
        caller = self.keys.caller(given)
        if caller is None:
            problem = "is not known" if given else "is missing"
            text = f"The API key {problem}: send 'Authorization: Bearer <key>'."
            return await error_response(ApiRefusal(401, text, "invalid_api_key"))(scope, receive, send)
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body above `limit` bytes, before it is read when its length is announced, else as it arrives."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request with a counted body."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        text = f"The body is larger than {self.limit} bytes."
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limit:
            return await error_response(ApiRefusal(413, text, "body_too_large"))(scope, receive, send)
        read = 0

        async def counted_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                # The framework lets this one class through while it reads a body.
                raise HTTPException(413, text)
            return message

        await self.app(scope, counted_receive, send)
