"""Requests per minute: each caller has its own bucket, which fills evenly; nobody waits for another's."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.types import Message, Scope

from adapterhub_lite.web import rates
from adapterhub_lite.web.rates import RateLimit


class Client:
    """Sends requests through the limit at a time of its choosing."""

    def __init__(self, per_minute: int) -> None:
        self.now = 0.0
        self.limit = RateLimit(
            PlainTextResponse("here"), per_minute, lambda scope: scope["path"], clock=lambda: self.now
        )

    def ask(self, caller: str) -> tuple[int, int]:
        """Status of one request, and the seconds of its Retry-After (0 without)."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        scope: Scope = {"type": "http", "path": caller, "method": "GET", "headers": []}
        with contextlib.suppress(StopIteration):  # nothing in it waits, so no event loop is needed
            self.limit(scope, receive, send).send(None)
        headers = dict(sent[0]["headers"])
        return sent[0]["status"], int(headers.get(b"retry-after", b"0"))


def test_a_caller_who_sends_too_much_is_told_when_to_come_back_and_nobody_else_is() -> None:
    client = Client(per_minute=60)
    assert [client.ask("a")[0] for _ in range(60)] == [200] * 60
    status, seconds = client.ask("a")
    assert (status, client.ask("b")[0]) == (429, 200)
    client.now += seconds
    assert client.ask("a") == (200, 0)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=200), st.integers(1, 100))
def test_never_more_than_two_minutes_worth_in_one_minute(pauses: list[float], per_minute: int) -> None:
    client, taken = Client(per_minute), []
    for pause in pauses:
        client.now += pause
        if client.ask("a")[0] == 200:
            taken.append(client.now)
    for start in taken:
        assert sum(start <= at < start + 60 for at in taken) <= 2 * per_minute + 1


def test_callers_that_are_remembered_are_bounded() -> None:
    client = Client(per_minute=1)
    before, rates.MOST_CALLERS = rates.MOST_CALLERS, 3
    try:
        for number in range(10):
            client.ask(str(number))
        assert len(client.limit._budgets) == 3
    finally:
        rates.MOST_CALLERS = before
