"""One replica of the engine inside Ray Serve. Imports ray, which only `serve --cluster` needs."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray import serve

from adapterhub_lite import errors
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.split import parse_blend
from adapterhub_lite.serving.engine.engine import InferenceEngine
from adapterhub_lite.serving.engine.request import EngineStatus, GenerationChunk, GenerationRequest

T = TypeVar("T")
SLOTS = 64
ONGOING = 64


@dataclass(frozen=True)
class Refusal:
    """One of our errors on its way between processes: its class by name, and its text."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: errors.AdapterHubError) -> "Refusal":
        """Pack an error; of a class unknown to `errors`, its nearest known parent."""
        kind = next(one.__name__ for one in type(error).__mro__ if hasattr(errors, one.__name__))
        return cls(kind, str(error))

    def error(self) -> errors.AdapterHubError:
        """The error with its class and text, without its other attributes."""
        kind: type[errors.AdapterHubError] = getattr(errors, self.kind)
        error = kind.__new__(kind)
        Exception.__init__(error, self.text)
        return error


class Replica:
    """An `InferenceEngine` on a registry that all replicas share."""

    def __init__(self, base: str, home: str | None, options: dict[str, Any]) -> None:
        registry = AdapterRegistry(home)
        self._engine = InferenceEngine.from_base(base, registry=registry, home=home, max_slots=SLOTS, **options)
        self._threads = ThreadPoolExecutor(ONGOING + 4, thread_name_prefix="adapterhub-replica")

    async def answer(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk | Refusal]:
        """Yield the answer as it is made, or a refusal as its last item; closing the iteration cancels the request."""
        handle = None
        try:
            if request.adapter is not None:
                await self.hold(str(request.adapter))
            handle = await self._run(self._engine.submit, request)
            chunks = iter(handle)
            while True:
                chunk = await self._run(next, chunks)
                yield chunk
                if chunk.done:
                    return
        except errors.AdapterHubError as error:
            yield Refusal.of(error)
        finally:
            if handle is not None:
                handle.cancel()

    @serve.multiplexed(max_num_models_per_replica=SLOTS)  # type: ignore[untyped-decorator]
    async def hold(self, model_id: str) -> str:
        """Load what a request needs, so that Ray sends the next one for it here too."""
        for part in parse_blend(model_id):
            await self._run(self._engine.load, part.reference)
        return model_id

    async def encode(self, request: GenerationRequest) -> list[int] | Refusal:
        """The tokens that a request is asked with."""
        try:
            return await self._run(self._engine.encode, request)
        except errors.AdapterHubError as error:
            return Refusal.of(error)

    async def load(self, reference: str) -> ResidentAdapter | Refusal:
        """Bring an adapter into memory."""
        try:
            return await self._run(self._engine.load, reference)
        except errors.AdapterHubError as error:
            return Refusal.of(error)

    async def unload(self, reference: str) -> bool | Refusal:
        """Take an adapter out of memory once nobody uses it."""
        try:
            return await self._run(self._engine.unload, reference)
        except errors.AdapterHubError as error:
            return Refusal.of(error)

    async def look(self) -> tuple[int, EngineStatus, list[ResidentAdapter]]:
        """The id of this replica's process, its engine's status, and the adapters in its memory."""
        return os.getpid(), self._engine.status(), self._engine.resident()

    def check_health(self) -> None:
        """Called by Ray: a replica whose engine ended is replaced."""
        if not self._engine.status().can_serve:
            raise RuntimeError("The engine has ended.")

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)


def application(
    base: str | Path, home: str | Path | None, *, deployment: dict[str, Any], options: dict[str, Any]
) -> Any:
    """The Ray Serve application: replicas of one engine. `options` are those of `InferenceEngine.from_base`."""
    made = serve.deployment(name="engine", max_ongoing_requests=ONGOING, **deployment)(Replica)
    return made.bind(str(base), None if home is None else str(home), options)
