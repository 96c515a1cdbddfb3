"""One request on its way through vLLM: asked on the loop's thread, told to whoever listens, sent elsewhere if need be."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adapterhub_lite.errors import (
    EngineUnreachableError,
    RequestCancelledError,
    RequestTimeoutError,
    ServingError,
)
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.slots import Slot
from adapterhub_lite.serving.engine.request import (
    GenerationChunk,
    GenerationResult,
    Timings,
    TokenLogprob,
    Usage,
)
from adapterhub_lite.serving.engine.sequence import Outbox
from adapterhub_lite.serving.vllm.adapter_files import RemoteAdapter, model_name
from adapterhub_lite.serving.vllm.backend import AdapterGoneError, Backend, Loop
from adapterhub_lite.serving.vllm.wire import (
    Asked,
    Json,
    Piece,
    completion_body,
    label_logprobs,
    piece,
    scoring_body,
)


@dataclass(eq=False)
class Place:
    """Where a request is computed, with its adapter held in a slot there; `seconds` from its reference to that.

    `avoid` are backends that failed for it.
    """

    backend: Backend
    found: FoundAdapters
    slot: Slot[RemoteAdapter] | None
    avoid: tuple[Backend, ...] = ()
    seconds: float = 0.0

    @property
    def model(self) -> str:
        """What vLLM calls the model that is asked."""
        return self.backend.base_model if self.slot is None else model_name(self.slot.digest)

    def load_again(self) -> None:
        """Have the backend load the adapter that it has lost."""
        self.backend.ensure(self.found, again=True)

    def release(self) -> None:
        """Let go of the slot, once."""
        slot, self.slot = self.slot, None
        if slot is not None:
            self.backend.slots.release(slot)


class Placing(Protocol):
    """What an answer needs of its engine."""

    def place(self, found: FoundAdapters, timeout: float | None, avoid: tuple[Backend, ...] = ()) -> Place:
        """A place for a request to what was found."""
        ...

    def computed(self, tokens: int) -> None:
        """Count tokens of a finished answer."""
        ...


@dataclass(eq=False)
class VllmAnswer:
    """A submitted request: listen, iterate over its chunks, or wait for its result. For one consumer.

    It is sent when somebody begins to read. A vLLM that fails before anything of the answer was handed out is replaced by
    another one, where there is one; one that has lost the adapter is given it again.
    """

    asked: Asked
    place: Place
    base_fingerprint: str
    labels: Sequence[Sequence[int]]
    engine: Placing
    loop: Loop
    submitted: float
    outbox: Outbox = field(default_factory=Outbox)
    first_token: float = 0.0
    _whole: bool = False
    _task: "asyncio.Task[None] | None" = None
    _begun: bool = False
    _result: GenerationResult | None = None

    def cancel(self) -> None:
        """Stop it; vLLM gives it up at its next step. Reading it then raises RequestCancelledError."""

        def stop() -> None:
            if self._task is not None:
                self._task.cancel()
            elif not self._begun:
                self._begun = True
                self.place.release()
                self.outbox.put(RequestCancelledError("The request was cancelled by its caller."))

        self.loop.soon(stop)

    def listen(self, listener: Callable[[GenerationChunk | BaseException], None], *, whole: bool = False) -> None:
        """Tell `listener`, on the loop's thread, each chunk as it is made (`whole`: the last alone), or the error."""
        self._whole = whole
        self.outbox.listen(listener)
        self._begin()

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Yield chunks as they are made; the last one is `done` and carries the result.

        Raises:
            ServingError: cancelled, timed out, or vLLM failed.
        """
        self._begin()
        while self._result is None:
            item = self.outbox.get()
            if isinstance(item, BaseException):
                self.outbox.put(item)
                raise item
            self._result = item.result
            yield item

    def result(self) -> GenerationResult:
        """Wait for the whole answer. Raises as iterating does."""
        self._whole = not self._begun
        for _ in self:
            pass
        assert self._result is not None
        return self._result

    def _begin(self) -> None:
        def begin() -> None:
            if not self._begun:
                self._begun = True
                self._task = self.loop.loop.create_task(self._run())
                # Not in the task itself: one that is cancelled before its first step never runs.
                self._task.add_done_callback(self._settle)

        self.loop.soon(begin)

    async def _run(self) -> None:
        limit = self.asked.request.timeout_seconds
        left = None if limit is None else max(0.0, self.submitted + limit - time.perf_counter())
        try:
            async with asyncio.timeout(left):
                await self._until_answered()
        except TimeoutError:
            self.outbox.put(RequestTimeoutError(f"The request took longer than its limit of {limit} s."))
        except Exception as error:
            self.outbox.put(error)

    def _settle(self, task: "asyncio.Task[None]") -> None:
        self.place.release()
        if task.cancelled():
            self.outbox.put(RequestCancelledError("The request was cancelled by its caller."))

    async def _until_answered(self) -> None:
        reloaded = False
        while True:
            backend = self.place.backend
            backend.in_work += 1
            try:
                await self._ask(backend)
                return
            except AdapterGoneError:
                if self.first_token or reloaded:
                    raise
                reloaded = True
                await asyncio.to_thread(self.place.load_again)
            except EngineUnreachableError:
                if self.first_token:
                    raise
                await self._move((*self.place.avoid, backend))
            finally:
                backend.in_work -= 1

    async def _move(self, avoid: tuple[Backend, ...]) -> None:
        """Find another place. One that is found after this request was cancelled is let go of at once."""
        self.place.release()
        timeout = self.asked.request.timeout_seconds
        finding = asyncio.ensure_future(asyncio.to_thread(self.engine.place, self.place.found, timeout, avoid))
        try:
            self.place = await asyncio.shield(finding)
        except asyncio.CancelledError:
            finding.add_done_callback(_release)
            raise

    async def _ask(self, backend: Backend) -> None:
        if self.labels:
            body = scoring_body(self.asked.prompt_ids, self.labels, self.place.model)
            answer = await backend.answer(body)
            scores = label_logprobs(answer["choices"], len(self.asked.prompt_ids), self.labels)
            self._end([Piece("", (), None, "stop")], answer, scores)
            return
        # vLLM tells a prompt's log-probabilities with whole answers alone.
        if self._whole or self.asked.request.prompt_logprobs is not None:
            answer = await backend.answer(completion_body(self.asked, self.place.model, stream=False))
            self._end([piece(answer["choices"][0], self.asked)], answer)
            return
        told: list[Piece] = []
        last: Json = {}
        async for chunk in backend.chunks(completion_body(self.asked, self.place.model, stream=True)):
            last = chunk
            for choice in chunk["choices"]:
                self.first_token = self.first_token or time.perf_counter()
                told.append(piece(choice, self.asked))
                # The last one waits for the usage, which comes behind it.
                if told[-1].reason is None:
                    self._tell(told[-1])
        if not told or told[-1].reason is None:
            raise ServingError("vLLM ended its answer without saying why.")
        self._end(told, last)

    def _tell(self, told: Piece) -> None:
        count = len(self.asked.prompt_ids)
        self.outbox.put(GenerationChunk(told.text, False, told.token_ids, told.logprobs, prompt_tokens=count))

    def _end(self, pieces: Sequence[Piece], answer: Json, labels: tuple[float, ...] | None = None) -> None:
        now, last, request = time.perf_counter(), pieces[-1], self.asked.request
        ids = tuple(token for one in pieces for token in one.token_ids)
        every: tuple[TokenLogprob, ...] = tuple(value for one in pieces for value in one.logprobs or ())
        name, digest = self.place.found.receipt() if self.place.found.files else (None, None)
        usage = answer.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        first = (self.first_token or now) - self.submitted
        writing = now - self.submitted - first
        result = GenerationResult(
            text="".join(one.text for one in pieces),
            token_ids=ids,
            finish_reason=last.reason or "length",
            adapter=name,
            adapter_digest=digest,
            base_fingerprint=self.base_fingerprint,
            usage=Usage(len(self.asked.prompt_ids), len(ids), cached),
            timings=Timings(
                switch_seconds=self.place.seconds,
                first_token_seconds=first,
                total_seconds=now - self.submitted,
                tokens_per_second=(len(ids) - 1) / writing if len(ids) > 1 and writing > 0 else 0.0,
            ),
            logprobs=every if request.logprobs is not None else None,
            prompt_logprobs=last.prompt_logprobs,
            label_logprobs=labels,
        )
        self.engine.computed(len(ids))
        chunk = GenerationChunk(
            last.text, True, last.token_ids, last.logprobs, last.prompt_logprobs, len(self.asked.prompt_ids), result
        )
        self.outbox.put(chunk)


def _release(found: "asyncio.Future[Place]") -> None:
    if not found.cancelled() and found.exception() is None:
        found.result().release()
