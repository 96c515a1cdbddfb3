"""Between HTTP and the engine: which adapter a request means at this moment, and answers without blocking the loop.

A model's name is resolved once, through the splits in force, to digests; the engine is asked for those, and an
answer whose digest is not theirs is never given out. A request is handed in on a thread of
ours, because that may load its adapter; the engine then tells the loop what it makes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.reference import AdapterReference
from adapterhub_lite.errors import QueueFullError, RequestCancelledError, ServingError
from adapterhub_lite.serving.adapters.split import WeightedReference, parse_blend
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.engine_protocol import Answer, Engine
from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.serving.api.metrics import Metrics
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest, GenerationResult

T = TypeVar("T")
MAX_PARTS = 8
BASE_NAMES = ("base",)


@dataclass(frozen=True)
class Pinned:
    """What a model's name means now: exact versions for the engine, and the receipt that the answer must carry."""

    reference: str | None
    adapter: str | None
    digest: str | None
    base: str

    def receipt(self) -> dict[str, str | None]:
        """The field that every answer carries."""
        return {"adapter": self.adapter, "adapter_digest": self.digest, "base_fingerprint": self.base}

    def headers(self) -> dict[str, str]:
        """The same as headers; an answer of the bare base says so in words."""
        return {
            "X-Adapterhub-Adapter": self.adapter or "base",
            "X-Adapterhub-Digest": self.digest or "none",
            "X-Adapterhub-Base": self.base,
        }

    def prove(self, result: GenerationResult) -> GenerationResult:
        """Hand on an answer of exactly these versions; anything else is our failure and is not given out.

        By digest: the same bytes may have another name too.
        """
        if (result.adapter_digest, result.base_fingerprint) != (self.digest, self.base):
            raise ServingError(f"{self.adapter} was asked for, but {result.adapter} answered.")
        return result


class Desk:
    """Takes requests to one engine, for callers with their rights, within the server's limits."""

    def __init__(self, engine: Engine, registry: Any, settings: ServerSettings) -> None:
        self.engine, self.registry, self.settings, self.metrics = engine, registry, settings, Metrics()
        self._pool = ThreadPoolExecutor(settings.max_concurrent + 4, thread_name_prefix="adapterhub-request")
        self._in_work = 0
        self.served = frozenset(AdapterReference.parse(ref).name for ref in settings.references)

    def close(self) -> None:
        """Let the threads go once what they wait for has ended."""
        self._pool.shutdown(wait=False)

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call something that blocks, on a thread of ours."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def resolve(self, reference: str, caller: Caller, *, through_split: bool = False) -> AdapterManifest:
        """The version that a reference names now, for a caller who may use it.

        `through_split` counts as a request: what is asked for needs the caller's right, the candidate does not.

        Raises:
            ReferenceSyntaxError, UnknownNameError: it is none; a path never is one.
            ApiRefusal: the caller may not use it (403), or it is not served here (404).
        """
        parsed = AdapterReference.parse(reference)
        if parsed.name is not None:
            self._require(parsed.name, caller)
        chosen = self.engine.choose(str(parsed)) if through_split else str(parsed)
        manifest: AdapterManifest = self.registry.resolve(chosen)
        if chosen == str(parsed):
            self._require(manifest.name, caller)
        return manifest

    def serves(self, name: str) -> bool:
        """Whether this server was started to serve the adapter of this name."""
        return not self.served or name in self.served

    def _require(self, name: str, caller: Caller) -> None:
        if not caller.may_use(name):
            raise ApiRefusal(403, f"This key may not use the adapter {name!r}.", "adapter_not_allowed", param="model")
        if not self.serves(name):
            served = ", ".join(sorted(map(str, self.served)))
            raise ApiRefusal(404, f"{name!r} is not served here. Served: {served}.", "model_not_found", param="model")

    def pin(self, model: str, caller: Caller, *, through_split: bool = False) -> Pinned:
        """What `model` (the base, a reference or a blend) means at this moment. As `resolve` does, and raises so."""
        base = self.engine.base_fingerprint
        if model in (*BASE_NAMES, self.settings.base_name):
            return Pinned(None, None, None, base)
        parts = self._parts(model)
        names, digests = [], []
        for part in parts:
            manifest = self.resolve(str(part.reference), caller, through_split=through_split)
            # As the engine writes it, so that the receipts can be compared.
            factor = "" if len(parts) == 1 and part.weight == 1.0 else f"*{part.weight!r}"
            names.append(manifest.reference + factor)
            digests.append(manifest.digest + factor)
        # By digest, which no split and no move of an alias means anything to.
        exact = "+".join(digests)
        return Pinned(exact, "+".join(names), exact, base)

    @staticmethod
    def _parts(model: str) -> tuple[WeightedReference, ...]:
        # Each piece must be a reference before anything else looks at the text: no path gets any further.
        pieces = model.split("+")
        if len(pieces) > MAX_PARTS:
            raise ApiRefusal(400, f"A blend has at most {MAX_PARTS} parts.", "invalid_value", param="model")
        for piece in pieces:
            AdapterReference.parse(piece.partition("*")[0].strip())
        return parse_blend(model)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for requests in work. Raises QueueFullError when all are taken."""
        if self._in_work >= self.settings.max_concurrent:
            raise QueueFullError(f"{self._in_work} requests are in work, which is the limit. Try again in a second.")
        self._in_work += 1
        self.metrics.in_work.inc()
        try:
            yield
        finally:
            self._in_work -= 1
            self.metrics.in_work.dec()

    async def answer(self, http: Request, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Answer all of `requests`; whoever hangs up meanwhile cancels them."""
        return await unless_gone(http, self._answers(requests))

    async def _answers(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        tasks = [asyncio.ensure_future(self._answer(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, request: GenerationRequest) -> GenerationResult:
        async with aclosing(self.stream(request, whole=True)) as chunks:
            last = await anext(chunks)
        assert last.result is not None
        return last.result

    async def stream(self, request: GenerationRequest, *, whole: bool = False) -> AsyncGenerator[GenerationChunk]:
        """The chunks of one answer as they are made, or the last alone; closing the iteration cancels the request."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[GenerationChunk | BaseException]()
        submitting = asyncio.ensure_future(self.run(self.engine.submit, request))
        try:
            handle = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_late)
            raise

        def hand_over(item: GenerationChunk | BaseException) -> None:
            # On the engine's thread: a loop that is closed by now must not harm it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        try:
            handle.listen(hand_over, whole=whole)
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.done:
                    return
        finally:
            handle.cancel()

    def load(self, reference: str, caller: Caller) -> Any:
        """Bring an adapter into memory, timed."""
        manifest, started = self.resolve(reference, caller), time.perf_counter()
        loaded = self.engine.load(manifest.reference)
        self.metrics.load.labels(manifest.reference).observe(time.perf_counter() - started)
        return loaded


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """What `work` comes to; it is cancelled when the client hangs up first.

    Raises:
        RequestCancelledError: the client is gone and `work` was cancelled.
    """
    working: asyncio.Future[T] = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(http))
    try:
        watched: set[asyncio.Future[Any]] = {working, leaving}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
        return await working
    except asyncio.CancelledError:
        if leaving.done():
            raise RequestCancelledError("The client is gone.") from None
        raise
    finally:
        leaving.cancel()


def _cancel_late(submitting: "asyncio.Future[Answer]") -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


async def _hung_up(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
