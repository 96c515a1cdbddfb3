"""One request on its way through the engine: its sampler, its text, its state; and the handle that its caller keeps."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.errors import RequestCancelledError, RequestTimeoutError, ServingError
from adapterhub_lite.serving.adapters.pool import Route
from adapterhub_lite.serving.engine.request import (
    GenerationChunk,
    GenerationRequest,
    GenerationResult,
    Timings,
    TokenLogprob,
    Usage,
)

Item = GenerationChunk | BaseException
logger = logging.getLogger("adapterhub.engine")


class Sampler:
    """Chooses the tokens of one request. Its stream depends on the seed alone, never on the batch around it."""

    def __init__(self, request: GenerationRequest, prompt_ids: Sequence[int]) -> None:
        self._request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._seen: torch.Tensor | None = None
        if request.repetition_penalty != 1.0:
            self._seen = torch.tensor(sorted(set(prompt_ids)), dtype=torch.long)

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest logit and nothing else."""
        return self._request.temperature == 0.0 and self._seen is None

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token id; logits (vocabulary,) float32, left as they are."""
        request = self._request
        if self._seen is not None:
            logits = logits.clone()
            seen = logits[self._seen]
            penalty = request.repetition_penalty
            logits[self._seen] = torch.where(seen > 0, seen / penalty, seen * penalty)
        token = int(logits.argmax()) if request.temperature == 0.0 else self._draw(logits)
        if self._seen is not None and token not in self._seen:
            self._seen = torch.cat([self._seen, torch.tensor([token])])
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        request = self._request
        # float64: a temperature of 1e-6 must sharpen, not overflow
        scores = (logits.double() - logits.max()) / request.temperature
        width = min(request.top_k or scores.shape[0], scores.shape[0])
        if width < scores.shape[0] or request.top_p < 1.0:
            scores, order = torch.topk(scores, width)
            probabilities = torch.softmax(scores, dim=-1)
            # Keep the smallest set that reaches top_p: those whose forerunners have not reached it yet.
            before = probabilities.cumsum(-1) - probabilities
            probabilities[(before >= request.top_p).nonzero()] = 0.0
            return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator))


def token_logprob(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """Return the log-probability of `token_id` and of the `top` likeliest tokens; logits (vocabulary,) float32."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, top)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class TextStream:
    """Decodes one answer piece by piece. `text` is all that was given out, `stopped` whether a stop string came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [StopString(text) for text in stop]
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now certain, possibly none."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        if now.endswith("�"):  # a character of several tokens is not whole yet
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._give(now[len(before) :])

    def finish(self) -> str:
        """Return what was held back: the end of the answer has come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        rest = self._decode(self._ids[self._prefix :])[len(before) :]
        self._prefix = self._read = len(self._ids)
        piece = self._give(rest)
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _give(self, piece: str) -> str:
        """Pass on what cannot be the beginning of a stop string."""
        pending = self._held + piece
        for at, character in enumerate(piece, len(self._held)):
            complete = [len(stop.text) for stop in self._stop if stop.advance(character)]
            if complete:
                self.stopped = True
                given, self._held = pending[: at + 1 - max(complete)], ""
                break
        else:
            keep = max((stop.matched for stop in self._stop), default=0)
            given, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += given
        return given


class StopString:
    """Follows one stop string through a text. `matched` is the length of the longest end of the text that begins it.

    Knuth, Morris and Pratt's matcher: a character costs constant time on average, however long the stop string is, and
    its table grows only as far as the text matches.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _shorter[n - 1]: the length of the longest end of text[:n], short of the whole, that begins the text.
        self._shorter = [0]

    def advance(self, character: str) -> bool:
        """Take the next character; True when the stop string ends with it."""
        self.matched = self._after(self.matched, character)
        if self.matched > len(self._shorter):
            self._shorter.append(self._after(self._shorter[-1], self.text[len(self._shorter)]))
        return self.matched == len(self.text)

    def _after(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)


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
    """A request's state. After submission only the engine's thread changes it, but for `cancelled`."""

    request: GenerationRequest
    prompt_ids: Sequence[int]
    route: Route
    sampler: Sampler
    stream: TextStream
    base_fingerprint: str
    submitted: float
    limit: int
    row: int = -1
    computed: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    admitted: float = 0.0
    first_token: float = 0.0
    placing: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    outbox: Outbox = field(default_factory=Outbox)
    ended: bool = False
    passed_over: int = 0

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
        if self.computed >= len(self.prompt_ids):
            at = self.computed - len(self.prompt_ids)
            return self.output[at : at + count]
        return list(self.prompt_ids[self.computed : self.computed + count])

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
                item = GenerationChunk(rest, done=True, result=self._result(outcome))
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
        timings = Timings(
            queue_seconds=self.admitted - self.submitted,
            switch_seconds=self.route.seconds + self.placing,
            first_token_seconds=self.first_token - self.submitted,
            total_seconds=now - self.submitted,
            tokens_per_second=(len(self.output) - 1) / writing if len(self.output) > 1 and writing > 0 else 0.0,
        )
        return GenerationResult(
            text=self.stream.text,
            token_ids=tuple(self.output),
            finish_reason=reason,
            adapter=self.route.name,
            adapter_digest=self.route.digest,
            base_fingerprint=self.base_fingerprint,
            usage=Usage(len(self.prompt_ids), len(self.output)),
            timings=timings,
            logprobs=tuple(self.logprobs) if self.request.logprobs is not None else None,
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
