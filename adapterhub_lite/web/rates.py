"""How much a caller may use in a minute: a bucket that fills evenly, and a limit of requests made of such buckets."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_lite.web.guard import Refuse, plain_refusal

# Callers that are remembered; who was not seen for longest is forgotten, and begins with a full bucket.
MOST_CALLERS = 10_000


class Budget:
    """Units per minute, as a bucket that fills evenly and begins full. What is spent may be known afterwards only: it may
    go into debt."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._left, self._seen = float(per_minute), now

    def seconds_to_wait(self, now: float) -> float:
        """Seconds until there is something left; 0 when there is."""
        self._left = min(float(self.per_minute), self._left + (now - self._seen) * self.per_minute / 60)
        self._seen = now
        return 0.0 if self._left > 0 else (1 - self._left) * 60 / self.per_minute

    def spend(self, units: int) -> None:
        """Take units out."""
        self._left -= units


class RateLimit:
    """ASGI middleware: at most `per_minute` requests per caller and minute, then 429 with the seconds to wait.

    `caller` says who sent a request, from its scope. The answer has `Retry-After`, and `RateLimit` as huggingface.co
    sends it (draft-ietf-httpapi-ratelimit-headers). Used on one event loop, so without a lock.
    """

    def __init__(
        self,
        app: ASGIApp,
        per_minute: int,
        caller: Callable[[Scope], str],
        *,
        refuse: Refuse = plain_refusal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.per_minute = app, per_minute
        self._caller, self._refuse, self._clock = caller, refuse, clock
        self._budgets: OrderedDict[str, Budget] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request, and hand it on or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        caller, now = self._caller(scope), self._clock()
        budget = self._budgets.setdefault(caller, Budget(self.per_minute, now))
        self._budgets.move_to_end(caller)
        if len(self._budgets) > MOST_CALLERS:
            self._budgets.popitem(last=False)
        wait = budget.seconds_to_wait(now)
        if not wait:
            budget.spend(1)
            return await self.app(scope, receive, send)
        seconds = math.ceil(wait)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                named = [
                    (b"retry-after", str(seconds).encode()),
                    (b"ratelimit", f'"api";r=0;t={seconds}'.encode()),
                    (b"ratelimit-policy", f'"fixed window";"api";q={self.per_minute};w=60'.encode()),
                ]
                message = {**message, "headers": [*message.get("headers", ()), *named]}
            await send(message)

        text = f"More than {self.per_minute} requests in a minute; try again in {seconds} s."
        await self._refuse(429, text)(scope, receive, with_headers)
