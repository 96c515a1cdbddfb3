"""One request on its way through the engine: its state, and the handle that its caller keeps."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from adapterhub_lite.errors import RequestCancelledError, RequestTimeoutError, ServingError
from adapterhub_lite.serving.adapters.pool import Route
from adapterhub_lite.serving.engine.constraints import Constraint
from adapterhub_lite.serving.engine.request import (
    GenerationChunk,
    GenerationRequest,
    GenerationResult,
    Timings,
    TokenLogprob,
    Usage,
)
from adapterhub_lite.serving.engine.sampling import Sampler
from adapterhub_lite.serving.engine.scoring import LabelLogprobs, PromptLogprobs
from adapterhub_lite.serving.engine.text import TextStream
from adapterhub_lite.serving.model.packed_step import RowSlice

Item = GenerationChunk | BaseException
logger = logging.getLogger("adapterhub.engine")


class Outbox:
    """What a request's caller gets, in order: kept until it is taken, or told to a listener as it is made."""

    def __init__(self) -> None:
        self._kept = queue.SimpleQueue[Item]()
        self._listener: Callable[[Item], None] | None = None
        self._lock = threading.Lock()

    def put(self, item: Item) -> None:
        """Keep an item, or tell the listener."""
        with self._lock:
            if self._listener is None:
                self._kept.put(item)
                return
            try:
                self._listener(item)
            except Exception:
                # The engine's thread: whoever listens badly harms nobody else.
                logger.exception("A listener failed.")

    def get(self) -> Item:
        """Wait for the next item that was kept, and take it."""
        return self._kept.get()

    def listen(self, listener: Callable[[Item], None]) -> None:
        """Tell `listener` what was kept so far, and from now on each item on the thread that makes it."""
        with self._lock:
            while not self._kept.empty():
                listener(self._kept.get())
            self._listener = listener


@dataclass(eq=False)
class GenerationSequence:
    """A request's state. After submission only the engine's thread changes it, but for `cancelled`.

    Tokens of `ends` end the answer. With a `constraint` they do so only where the answer is of its form. With `labels`
    the output is what is computed of one label after the other. `told` tokens of it have been handed out.
    """

    request: GenerationRequest
    prompt_ids: Sequence[int]
    route: Route
    sampler: Sampler
    stream: TextStream
    base_fingerprint: str
    submitted: float
    limit: int
    ends: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    prompt_logprobs: PromptLogprobs | None = None
    labels: LabelLogprobs | None = None
    row: int = -1
    computed: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    told: int = 0
    admitted: float = 0.0
    first_token: float = 0.0
    placing: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    outbox: Outbox = field(default_factory=Outbox)
    ended: bool = False
    passed_over: int = 0
    # Waits until `leader` has read the first `common` tokens, and takes them over; `cached` tokens were taken over.
    leader: "GenerationSequence | None" = None
    common: int = 0
    cached: int = 0

    @property
    def need(self) -> int:
        """Tokens that it may have at its end, prompt and output."""
        return len(self.prompt_ids) + self.limit

    @property
    def known(self) -> int:
        """Tokens there are so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output)

    @property
    def left(self) -> int:
        """Tokens known and not computed yet."""
        return self.known - self.computed

    def upcoming(self, count: int) -> list[int]:
        """Return the next `count` tokens to compute."""
        at = self.computed - len(self.prompt_ids)
        if at >= 0:
            return self.output[at : at + count]
        return [*self.prompt_ids[self.computed : self.computed + count], *self.output[: max(0, at + count)]]

    def slice(self, count: int) -> RowSlice:
        """What its row computes next, `count` tokens."""
        reader = self.prompt_logprobs or self.labels
        wanted = 1 if reader is None else reader.wanted(self.computed, count)
        return RowSlice(self.row, self.computed, self.upcoming(count), wanted)

    def chunk(self, text: str) -> GenerationChunk:
        """A piece of the answer, with what has not been told of its tokens."""
        prompt, first, self.told = self.prompt_logprobs, self.told, len(self.output)
        return GenerationChunk(
            text,
            token_ids=tuple(self.output[first:]),
            logprobs=None if self.request.logprobs is None else tuple(self.logprobs[first:]),
            prompt_logprobs=None if prompt is None or first else tuple(prompt.found),
            prompt_tokens=len(self.prompt_ids),
        )

    def overdue(self, now: float) -> BaseException | None:
        """Return the error that ends this sequence now, if one does."""
        timeout = self.request.timeout_seconds
        if self.cancelled.is_set():
            return RequestCancelledError("The request was cancelled by its caller.")
        if timeout is not None and now - self.submitted > timeout:
            return RequestTimeoutError(
                f"The request ran past its limit of {timeout} s with {len(self.output)} of at most "
                f"{self.request.max_new_tokens} tokens made. Allow more time, or ask for fewer tokens."
            )
        return None

    def end(self, outcome: BaseException | str) -> None:
        """Release the adapters and tell the caller: an error, or the reason the answer is finished. Never raises."""
        if self.ended:
            return
        self.ended = True
        item: Item
        if isinstance(outcome, BaseException):
            item = outcome
        else:
            try:
                rest = self.stream.finish()
                item = replace(self.chunk(rest), done=True, result=self._result(outcome))
            except Exception as error:
                item = ServingError(f"The answer could not be finished: {type(error).__name__}: {error}")
                item.__cause__ = error
        try:
            self.route.release()
        except Exception:
            logger.exception("An adapter could not be released.")
        self.outbox.put(item)

    def _result(self, reason: str) -> GenerationResult:
        now = time.perf_counter()
        writing = now - self.first_token
        written = () if self.labels is not None else tuple(self.output)
        timings = Timings(
            queue_seconds=self.admitted - self.submitted,
            switch_seconds=self.route.seconds + self.placing,
            first_token_seconds=self.first_token - self.submitted,
            total_seconds=now - self.submitted,
            tokens_per_second=(len(written) - 1) / writing if len(written) > 1 and writing > 0 else 0.0,
        )
        return GenerationResult(
            text=self.stream.text,
            token_ids=written,
            finish_reason=reason,
            adapter=self.route.name,
            adapter_digest=self.route.digest,
            base_fingerprint=self.base_fingerprint,
            usage=Usage(len(self.prompt_ids), len(written), self.cached),
            timings=timings,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs.found),
            label_logprobs=None if self.labels is None else tuple(self.labels.totals),
        )


class GenerationHandle:
    """A submitted request: iterate over its chunks, or wait for its result. For one consumer."""

    def __init__(self, sequence: GenerationSequence, wake: Callable[[], None]) -> None:
        self._sequence = sequence
        self._wake = wake
        self._result: GenerationResult | None = None

    def cancel(self) -> None:
        """Stop the request; its row is free within one step. Reading it then raises RequestCancelledError."""
        self._sequence.cancelled.set()
        self._wake()

    def listen(self, listener: Callable[[Item], None], *, whole: bool = False) -> None:
        """Instead of iterating: `listener` is told each chunk, the last one `done`, or the error that ended them.

        `whole` leaves out all but the last. Called on the engine's thread, so it must be quick and must not raise.
        """

        def last(item: Item) -> None:
            if isinstance(item, BaseException) or item.done:
                listener(item)

        self._sequence.outbox.listen(last if whole else listener)

    def __iter__(self) -> Iterator[GenerationChunk]:
        """Yield chunks as they are made; the last one is `done` and carries the result.

        Raises:
            ServingError: cancelled, timed out, closed, or failed inside the model.
        """
        while self._result is None:
            item = self._sequence.outbox.get()
            if isinstance(item, BaseException):
                # Left for the next reader too: an ended request never blocks anybody.
                self._sequence.outbox.put(item)
                raise item
            self._result = item.result
            yield item

    def result(self) -> GenerationResult:
        """Wait for the whole answer.

        Raises:
            ServingError: as for iterating.
        """
        for _ in self:
            pass
        assert self._result is not None
        return self._result


class ChunkStream(Iterator[GenerationChunk]):
    """The chunks of one request; closed or forgotten before the last, it cancels the request."""

    def __init__(self, handle: GenerationHandle) -> None:
        self._handle = handle
        self._chunks = iter(handle)

    def __next__(self) -> GenerationChunk:
        """Return the next chunk, as iterating over a handle does."""
        return next(self._chunks)

    def close(self) -> None:
        """Cancel what is left; nothing when the answer is whole."""
        self._handle.cancel()

    def __del__(self) -> None:
        self.close()
