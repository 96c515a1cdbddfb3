"""What stands on the page until Gradio's scripts have drawn it: the title and the outline of what comes, in the right colours.

Gradio's page is empty until its scripts have run. Its template takes nothing, so this is put into the HTML on its way out.
"""

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Behind this nothing of Gradio's page has been drawn yet.
_BODY = b"<gradio-app"
OPENING = Path(__file__).with_name("opening.html").read_bytes()


class Opening:
    """ASGI middleware: puts `OPENING` into the page itself; everything else passes as it is, unbuffered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != "/":
            return await self.app(scope, receive, send)
        start: Message = {}
        body = bytearray()

        async def send_with_opening(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if message.get("more_body", False):
                return
            whole = bytes(body).replace(_BODY, OPENING + _BODY, 1)
            MutableHeaders(raw=start["headers"])["content-length"] = str(len(whole))
            await send(start)
            await send({"type": "http.response.body", "body": whole})

        await self.app(scope, receive, send_with_opening)
