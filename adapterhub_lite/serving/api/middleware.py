"""What stands before every handler: a limit on the body of a request."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.serving.api.errors import ApiRefusal, error_response


class BodyLimit:
    """Refuses a body above `limit` bytes, before it is read when its length is announced, else as it arrives."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request with a counted body."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        text = f"The body is larger than {self.limit} bytes."
        announced = dict(scope["headers"]).get(b"content-length", b"0")
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
