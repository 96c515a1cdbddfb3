"""A gate for requests that must not be computed beside others."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Gate:
    """Lets requests through together, or one alone, in the order in which they came. For one event loop."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._inside, self._alone = 0, False
        self._moved = asyncio.Event()

    @asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncGenerator[None]:
        """Wait until those before this one let it in; `alone`: until nobody is inside, and nobody comes in meanwhile."""
        ticket = object()
        self._line.append(ticket)
        try:
            while self._line[0] is not ticket or self._alone or (alone and self._inside):
                await self._moved.wait()
            self._inside, self._alone = self._inside + 1, alone
        finally:
            self._line.remove(ticket)
            self._move()
        try:
            yield
        finally:
            self._inside, self._alone = self._inside - 1, False
            self._move()

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
