"""Between HTTP and the engine: which versions a request means, who may have how much in work, and answers without
blocking the event loop.

A model's name is resolved once, through the splits in force, to digests; the engine is asked for those, and an answer
with any other digest is never given out. A request is submitted on a thread, because that may load its adapter; from
then on the engine hands its chunks to the event loop.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from adapterhub_lite.adapter_format.manifest import AdapterManifest, AdapterReference
from adapterhub_lite.errors import RequestCancelledError, ServingError, UnknownNameError
from adapterhub_lite.serving.adapters.slots import ResidentAdapter
from adapterhub_lite.serving.adapters.sources import AdapterStore
from adapterhub_lite.serving.adapters.split import parse_blend
from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.engine_protocol import Answer, Engine
from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.serving.api.observe import BoundedLabels, Metrics
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationRequest, GenerationResult
from adapterhub_lite.web.rates import Budget

T = TypeVar("T")
MAX_PARTS = 8
BASE_NAME = "base"


@dataclass(frozen=True)
class ResolvedModel:
    """What a model's name means now: exact versions for the engine, and the receipt that the answer must carry.

    `reference` is by digest, so that no split and no moved alias changes its meaning; None is the bare base.
    """

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
            "X-Adapterhub-Adapter": self.adapter or BASE_NAME,
            "X-Adapterhub-Digest": self.digest or "none",
            "X-Adapterhub-Base": self.base,
        }

    def check(self, result: GenerationResult) -> GenerationResult:
        """Return an answer that was made by exactly these versions.

        Compared by digest: the same bytes may have another name too.

        Raises:
            ServingError: other versions made it.
        """
        if (result.adapter_digest, result.base_fingerprint) != (self.digest, self.base):
            raise ServingError(f"{self.adapter} was asked for, but {result.adapter} answered.")
        return result


class Shares:
    """Prompts in work by tenant. Used on the event loop alone, so without a lock. `clock` gives seconds.

    Counted in prompts, so that one request of 16 prompts weighs as much as 16 requests. A tenant may have `limit` prompts
    in work. When `limit` are in work in all, only a tenant with less than its fair share (`limit` over the number of
    tenants) gets in, so that whoever fills the server never shuts the others out; twice `limit` is the most there ever
    is. Which of them is computed next is the engine's scheduler's business, by tenant too.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.in_work: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._budgets: dict[str, Budget] = {}
        self._clock = clock

    @contextmanager
    def take(self, caller: Caller, prompts: int) -> Iterator[None]:
        """Count `prompts` of one request as in work.

        Raises:
            ApiRefusal: 429 when the tenant must come back later, 400 when so many prompts never fit.
        """
        self._check(caller, prompts)
        tenant = caller.tenant
        self.in_work[tenant] += prompts
        self._requests[tenant] += 1
        try:
            yield
        finally:
            for counts, count in ((self.in_work, prompts), (self._requests, 1)):
                counts[tenant] -= count
                if not counts[tenant]:
                    del counts[tenant]

    def spend(self, caller: Caller, tokens: int) -> None:
        """Take the tokens of an answer out of the caller's minute."""
        if caller.tokens_per_minute is not None:
            self._budget(caller.label, caller.tokens_per_minute).spend(tokens)

    def _check(self, caller: Caller, prompts: int) -> None:
        tenant = caller.tenant
        if prompts > self.limit:
            text = f"The request has {prompts} prompts, this server computes at most {self.limit} at once. Split it."
            raise ApiRefusal(400, text, "too_many_prompts", param="prompt")
        own, in_all = self.in_work[tenant], self.in_work.total()
        if caller.requests_in_work is not None and self._requests[tenant] >= caller.requests_in_work:
            raise _later(f"This key has {self._requests[tenant]} requests in work, which is its limit.")
        if caller.tokens_per_minute is not None:
            wait = self._budget(caller.label, caller.tokens_per_minute).seconds_to_wait(self._clock())
            if wait:
                raise _later(f"This key has used its {caller.tokens_per_minute} tokens per minute.", wait)
        if own + prompts > self.limit:
            raise _later(f"You have {own} prompts in work; with {prompts} more it is above the limit of {self.limit}.")
        tenants = len(self.in_work.keys() | {tenant})
        within_share = own + prompts <= max(1, self.limit // tenants) and in_all + prompts <= 2 * self.limit
        if in_all + prompts > self.limit and not within_share:
            raise _later(f"{in_all} prompts are in work, the limit is {self.limit}.")

    def _budget(self, label: str, per_minute: int) -> Budget:
        budget = self._budgets.get(label)
        if budget is None or budget.per_minute != per_minute:
            budget = self._budgets[label] = Budget(per_minute, self._clock())
        return budget


class Dispatcher:
    """Takes requests to one engine, for callers with their rights, within the server's limits."""

    def __init__(self, engine: Engine, store: AdapterStore, settings: ServerSettings) -> None:
        self.engine, self.store, self.settings, self.metrics = engine, store, settings, Metrics()
        self.shares, self.draining = Shares(settings.max_concurrent), False
        # One for each prompt that may be in work, and some for look-ups; they are started when they are needed.
        self._pool = ThreadPoolExecutor(2 * settings.max_concurrent + 4, thread_name_prefix="adapterhub-request")
        self._loaded = BoundedLabels()
        self._served = frozenset(AdapterReference.parse(reference).name for reference in settings.references)

    def close(self) -> None:
        """Let the threads end as soon as the calls they run return."""
        self._pool.shutdown(wait=False)

    # The arguments are those of the call, handed through.
    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make a blocking call on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def serves(self, name: str) -> bool:
        """Whether this server was started to serve the adapter of this name."""
        return not self._served or name in self._served

    def manifest(self, reference: str, caller: Caller, *, through_split: bool = False) -> AdapterManifest:
        """The version that a reference names now, for a caller who may use it.

        `through_split` counts as a request: the caller needs the right to what was asked for, not to the candidate.

        Raises:
            ReferenceSyntaxError: not a reference; a path never is one.
            ApiRefusal: the caller may not use it (403), or it is not served here (404).
        """
        parsed = AdapterReference.parse(reference)
        if parsed.name is not None:
            self._require(parsed.name, caller)
        chosen = self.engine.choose(str(parsed)) if through_split else str(parsed)
        try:
            manifest = self.store.resolve(str(chosen))
        except UnknownNameError:
            # The registry's own text lists what there is, which is not every caller's business.
            text = f"There is no adapter {reference!r} here."
            raise ApiRefusal(404, text, "model_not_found", param="model") from None
        if chosen == str(parsed):
            self._require(manifest.name, caller)
        return manifest

    def _require(self, name: str, caller: Caller) -> None:
        if not caller.may_use(name):
            raise ApiRefusal(403, f"This key may not use the adapter {name!r}.", "adapter_not_allowed", param="model")
        if not self.serves(name):
            served = ", ".join(sorted(str(one) for one in self._served if one and caller.may_use(one))) or "the base"
            raise ApiRefusal(404, f"{name!r} is not served here. Served: {served}.", "model_not_found", param="model")

    def resolve(self, model: str, caller: Caller, *, through_split: bool = False) -> ResolvedModel:
        """What `model` (the base, a reference or a blend) means at this moment. Raises as `manifest` does."""
        base = self.engine.base_fingerprint
        if model in (BASE_NAME, self.settings.base_name):
            return ResolvedModel(None, None, None, base)
        for name in (BASE_NAME, self.settings.base_name):
            # "base:adapter", as SGLang has it; "base:3" is a version of what is called so.
            model = model if model.removeprefix(f"{name}:").isdigit() else model.removeprefix(f"{name}:")
        pieces = model.split("+")
        if len(pieces) > MAX_PARTS:
            raise ApiRefusal(400, f"A blend has at most {MAX_PARTS} parts.", "invalid_value", param="model")
        for piece in pieces:
            # Each piece must be a reference before anything else reads the text: no path gets any further.
            AdapterReference.parse(piece.partition("*")[0].strip())
        parts, names, digests = parse_blend(model), [], []
        for part in parts:
            manifest = self.manifest(str(part.reference), caller, through_split=through_split)
            # Written as the engine does, so that the receipts can be compared.
            factor = "" if len(parts) == 1 and part.weight == 1.0 else part.factor
            names.append(manifest.reference + factor)
            digests.append(manifest.digest + factor)
        return ResolvedModel("+".join(digests), "+".join(names), "+".join(digests), base)

    @contextmanager
    def admit(self, caller: Caller, prompts: int = 1) -> Iterator[None]:
        """Count the prompts of one request as in work, those that are at the same time.

        Raises:
            ApiRefusal: 429 when the tenant must come back later, 503 while the server drains.
        """
        if self.draining:
            text = "This server is shutting down and takes no new requests; another one does."
            raise ApiRefusal(503, text, "shutting_down", retry_after=max(1, self.settings.drain_seconds))
        with ExitStack() as taken:
            try:
                taken.enter_context(self.shares.take(caller, min(prompts, self.settings.max_concurrent)))
            except ApiRefusal as refusal:
                if refusal.status == 429:
                    self.metrics.turned_away(caller.tenant)
                raise
            yield

    def count(self, caller: Caller, result: GenerationResult) -> None:
        """Count a finished answer, for everybody and for its caller."""
        self.metrics.answered(result)
        self.metrics.spent(caller.tenant, result)
        self.shares.spend(caller, result.usage.total_tokens)
        if caller.label == caller.tenant:
            self.metrics.own(caller.label).answered(result)

    async def answer(self, http: Request, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Answer all of `requests`, at most `max_concurrent` at once; a client that disconnects cancels them."""

        places = asyncio.Semaphore(self.settings.max_concurrent)

        async def one(request: GenerationRequest) -> GenerationResult:
            async with places, aclosing(self.stream(request, whole=True)) as chunks:
                last = await anext(chunks)
            assert last.result is not None
            return last.result

        async def every() -> list[GenerationResult]:
            tasks = [asyncio.ensure_future(one(request)) for request in requests]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return await until_disconnect(http, every())

    async def stream(self, request: GenerationRequest, *, whole: bool = False) -> AsyncGenerator[GenerationChunk]:
        """The chunks of one answer as they are made, or the last alone; closing the iteration cancels the request."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[GenerationChunk | BaseException]()
        submitting = asyncio.ensure_future(self.run(self.engine.submit, request))
        try:
            handle = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_answer)
            raise

        def put(item: GenerationChunk | BaseException) -> None:
            # On the engine's thread: an event loop that is closed by now must not harm it.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        try:
            handle.listen(put, whole=whole)
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.done:
                    return
        finally:
            handle.cancel()

    async def stream_all(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, GenerationChunk]]:
        """The chunks of several answers as they are made, each with the index of its request; at most `max_concurrent`
        of them at once. Closing the iteration, and the first error, cancel them all.
        """
        inbox = asyncio.Queue[tuple[int, GenerationChunk] | Exception]()
        places = asyncio.Semaphore(self.settings.max_concurrent)

        async def one(index: int, request: GenerationRequest) -> None:
            try:
                async with places, aclosing(self.stream(request)) as chunks:
                    async for chunk in chunks:
                        inbox.put_nowait((index, chunk))
            except Exception as error:
                inbox.put_nowait(error)

        tasks = [asyncio.ensure_future(one(index, request)) for index, request in enumerate(requests)]
        left = len(tasks)
        try:
            while left:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                left -= item[1].done
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def load(self, reference: str, caller: Caller) -> ResidentAdapter:
        """Bring an adapter into memory, timed."""
        manifest, started = self.manifest(reference, caller), time.perf_counter()
        loaded = self.engine.load(manifest.reference)
        self.metrics.load.labels(self._loaded(manifest.reference)).observe(time.perf_counter() - started)
        return loaded


async def until_disconnect(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects first.

    Raises:
        RequestCancelledError: the client has gone and `work` was cancelled.
    """

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working: asyncio.Future[T] = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected())
    try:
        # Futures of different results in one set.
        watched: set[asyncio.Future[Any]] = {working, leaving}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
        return await working
    except asyncio.CancelledError:
        if leaving.done():
            raise RequestCancelledError("The client has disconnected.") from None
        raise
    finally:
        leaving.cancel()


def _cancel_answer(submitting: "asyncio.Future[Answer]") -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def _later(text: str, seconds: float = 1.0) -> ApiRefusal:
    wait = max(1, math.ceil(seconds))
    return ApiRefusal(429, f"{text} Try again in {wait} s.", "too_many_requests", retry_after=wait)
