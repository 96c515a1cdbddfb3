"""The engine's thread: admit, plan, compute, sample, hand out; forever, until closed.

Only this thread touches the model. Memory for keys and values is granted before a request gets a row: one that does not
fit now waits. Whatever goes wrong for one request ends that one; where a step fails, each row computes its part alone.
A failure of the loop itself ends the requests in rows, once; the next one within `FORGIVEN_SECONDS` ends the engine.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch

from adapterhub_lite.errors import (
    AdapterHubError,
    ConfigurationError,
    EngineClosedError,
    ResourceError,
    ServingError,
)
from adapterhub_lite.serving.engine.reuse.guesses import Guesses
from adapterhub_lite.serving.engine.reuse.prefixes import Prefixes
from adapterhub_lite.serving.engine.sampling import token_logprob
from adapterhub_lite.serving.engine.scheduling import Scheduler
from adapterhub_lite.serving.engine.scoring import LabelLogprobs
from adapterhub_lite.serving.engine.sequence import GenerationSequence
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ModelRunner

logger = logging.getLogger("adapterhub.engine")
FORGIVEN_SECONDS = 600.0
# So long after the last request its keys and values stay for one that begins with the same tokens.
KEPT_SECONDS = 60.0


class EngineCore:
    """Runs steps on a thread of its own while there is work."""

    def __init__(self, runner: ModelRunner, *, max_queue: int, spare_rows: int = 0, guess: bool = True) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner.rows, max_queue, spare=spare_rows, whole_prompts=runner.whole_prompts)
        self._prefixes = Prefixes(runner)
        self._guesses = Guesses()
        self._guessing = guess and runner.shares_reads
        self._changed = threading.Condition()
        self._closed = False
        self.steps = 0
        self.tokens = 0
        self.restarts = 0
        self._failed_at = -math.inf
        self._at_end: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="adapterhub-engine", daemon=True)
        self._thread.start()

    def add(self, sequence: GenerationSequence) -> None:
        """Queue a sequence.

        Raises:
            QueueFullError: the queue is full.
            EngineClosedError: the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("The engine is closed; start another one.")
            self._scheduler.add(sequence)
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether requests are taken and computed."""
        return not self._closed and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Requests in rows now."""
        return len(self._scheduler.running)

    @property
    def guesses(self) -> tuple[int, int]:
        """Tokens guessed so far, and how many of them were right."""
        return self._guesses.made, self._guesses.right

    @property
    def waiting(self) -> int:
        """Requests in the queue now."""
        return len(self._scheduler.waiting)

    def waiting_by_tenant(self) -> dict[str, int]:
        """Requests in the queue now, per tenant."""
        with self._changed:
            return self._scheduler.waiting.by_tenant()

    def wake(self) -> None:
        """Look again at once: a sequence was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step in progress and end every sequence with EngineClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while True:
                try:
                    while self._wait():
                        running = self._scheduler.running
                        for sequence in running:
                            self._prefixes.follow(sequence, running)
                        slices = self._scheduler.plan()
                        if self._guessing:
                            slices = self._guesses.add(slices, running)
                        if slices:
                            self._step(slices)
                    return
                except Exception as error:
                    if not self._begin_anew(error):
                        return
        finally:
            # Reached by a failure of the thread itself too: then nobody waits for ever, and `alive` says so.
            with self._changed:
                self._closed = True
                sequences = [*self._scheduler.running, *self._scheduler.waiting]
                self._scheduler.waiting.clear()
            for sequence in sequences:
                sequence.end(EngineClosedError("The engine was closed before the answer was finished."))
            for call in self._at_end:
                call()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Make this call when no more requests are taken; at once when that is so already."""
        with self._changed:
            if not self._closed:
                self._at_end.append(call)
                return
        call()

    def _begin_anew(self, error: Exception) -> bool:
        """End what is in rows after a failure that no request can be blamed for; False when it is the second one."""
        logger.error("The engine's loop failed.", exc_info=error)
        failure = ServingError("The engine failed while this request was in work, and began anew; send it again.")
        failure.__cause__ = error
        for sequence in self._scheduler.running:
            self._end_in_row(sequence, failure)
        now = time.monotonic()
        recent, self._failed_at = now - self._failed_at < FORGIVEN_SECONDS, now
        if recent:
            logger.critical("The engine's loop failed again; the engine ends.")
            return False
        self.restarts += 1
        return True

    def _wait(self) -> bool:
        """Sleep until there is work, settle who is in which row; False when closed."""
        scheduler = self._scheduler
        with self._changed:
            seconds: float | None = KEPT_SECONDS
            while not (self._closed or scheduler.waiting or scheduler.running):
                if not self._changed.wait(seconds):
                    self._prefixes.clear()
                    self._runner.idle()
                    seconds = None
            if self._closed:
                return False
            now = time.perf_counter()
            for sequence in [*scheduler.running, *scheduler.waiting]:
                error = sequence.overdue(now)
                if error is not None and sequence.row >= 0:
                    self._end_in_row(sequence, error)
                elif error is not None:
                    scheduler.waiting.remove(sequence)
                    sequence.end(error)
            admitted = scheduler.admit(self._runner.fits)
        moves = scheduler.compact()
        for sequence, old_row in moves:
            if sequence not in admitted:
                try:
                    self._runner.move(old_row, sequence.row, sequence.route.parts)
                except Exception as error:
                    self._fail(sequence, error)
        for sequence in admitted:
            started = time.perf_counter()
            try:
                self._prefixes.take_over(sequence, scheduler.running)
                self._runner.admit(sequence.row, sequence.route.parts, sequence.need)
            except Exception as error:
                self._prefixes.clear()
                self._fail(sequence, error)
            sequence.admitted = time.perf_counter()
            sequence.placing = sequence.admitted - started
        return True

    def _step(self, slices: list[RowSlice]) -> None:
        rows = {part.row for part in slices}
        sequences = [sequence for sequence in self._scheduler.running if sequence.row in rows]
        try:
            logits = self._runner.forward(pack(slices, self._runner.device)).cpu()
        except Exception as error:
            if len(slices) > 1 and self._runner.repeatable:
                # One row's fault is not the others': each computes alone what it was to compute.
                for part in slices:
                    self._step([part])
                return
            for sequence in sequences:
                self._fail(sequence, error)
            return
        self.steps += 1
        counts = [part.logits for part in slices]
        # One pass over all of them; what is not a number is the largest too.
        finite = logits.amax(-1).isfinite().split(counts)
        for sequence, part, own, sound in zip(sequences, slices, logits.split(counts), finite, strict=True):
            known = min(len(part.token_ids), sequence.left)
            sequence.computed += known
            guess = part.token_ids[known:]
            try:
                width = self._runner.width(part.row) or self._runner.vocabulary
                if guess:
                    self._take_guessed(sequence, own[:, :width], sound.tolist(), guess)
                else:
                    check_finite(bool(sound.all()))
                    self._take(sequence, own[:, :width])
            except Exception as error:
                self._fail(sequence, error)

    def _fail(self, sequence: GenerationSequence, error: Exception) -> None:
        """End a sequence that something went wrong for."""
        failure: AdapterHubError
        if isinstance(error, (ConfigurationError, ResourceError)):
            failure = error
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            failure = ResourceError(
                "There is not enough memory for this request now; try again later, or ask for less."
            )
        else:
            failure = ServingError(f"The model failed on this request: {type(error).__name__}: {error}")
        if failure is not error:
            failure.__cause__ = error
        self._end_in_row(sequence, failure)

    def _end_in_row(self, sequence: GenerationSequence, failure: BaseException) -> None:
        row = sequence.row
        if self._scheduler.rows[row] is sequence:
            self._guesses.ended(sequence, keep=False)
            self._scheduler.leave(sequence)
            try:
                self._runner.cache.spoil(row)
                self._runner.leave(row)
            except Exception:
                logger.exception("A row could not be cleared; it is when it is used again.")
        sequence.end(failure)

    def _leave(self, sequence: GenerationSequence) -> None:
        self._guesses.ended(sequence, keep=self._guessing)
        self._prefixes.keep(sequence)
        self._runner.leave(sequence.row)
        self._scheduler.leave(sequence)

    def _take(self, sequence: GenerationSequence, logits: torch.Tensor) -> None:
        """Use the logits (n, vocabulary) after the last n tokens that the sequence has computed."""
        first = sequence.computed - logits.shape[0]
        for reader in (sequence.prompt_logprobs, sequence.labels):
            if reader is not None:
                reader.read(first, logits)
        if sequence.computed < sequence.known:
            return
        if not sequence.first_token:
            sequence.first_token = time.perf_counter()
        if sequence.labels is not None:
            self._next_label(sequence, sequence.labels)
        elif sequence.limit == 0:
            self._leave(sequence)
            sequence.end("length")
        else:
            if sequence.prompt_logprobs is not None and not sequence.output:
                sequence.outbox.put(sequence.chunk(""))
            self._advance(sequence, logits[-1])

    def _take_guessed(
        self, sequence: GenerationSequence, logits: torch.Tensor, finite: Sequence[bool], guess: Sequence[int]
    ) -> None:
        """Use the logits after the sequence's last token, and those after each guess that turns out to be right."""
        right = 0
        for own, sound in zip(logits, finite, strict=True):
            check_finite(sound)
            self._advance(sequence, own)
            if sequence.ended or right == len(guess) or sequence.output[-1] != guess[right]:
                break
            sequence.computed += 1
            right += 1
        self._guesses.learn(sequence, len(guess), right)

    def _next_label(self, sequence: GenerationSequence, labels: LabelLogprobs) -> None:
        """Go back to the end of the prompt for the next label, or end the sequence."""
        path = labels.next_path()
        if path is None:
            self._leave(sequence)
            sequence.end("stop")
            return
        sequence.output = list(path)
        # A state that cannot be gone back to is computed from the beginning.
        sequence.computed = len(sequence.prompt_ids) if self._runner.repeatable else 0

    def _advance(self, sequence: GenerationSequence, logits: torch.Tensor) -> None:
        """Choose the sequence's next token, hand out its text, and end the sequence when it is finished."""
        constraint = sequence.constraint
        allowed = None if constraint is None else constraint.allowed(logits.shape[0])
        token = sequence.sampler.choose(logits, allowed)
        sequence.output.append(token)
        self.tokens += 1
        if sequence.request.logprobs is not None:
            sequence.logprobs.append(token_logprob(logits, token, sequence.request.logprobs))
        piece = sequence.stream.push(token)
        reason = None
        ended = token in sequence.ends and (constraint is None or constraint.may_end)
        # An answer that nothing can follow is whole without an end token.
        whole = constraint is not None and not ended and not constraint.take(token)
        if ended or whole or sequence.stream.stopped:
            reason = "stop"
        elif len(sequence.output) >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._leave(sequence)
            # The held-back text goes with the last chunk; the piece before it is the same answer.
            if piece:
                sequence.outbox.put(sequence.chunk(piece))
            sequence.end(reason)
        elif piece:
            sequence.outbox.put(sequence.chunk(piece))


def check_finite(sound: bool) -> None:
    """Raise ServingError unless the logits are `sound`."""
    if not sound:
        raise ServingError("the logits are not finite; the adapter or the blend's weights are out of range")
