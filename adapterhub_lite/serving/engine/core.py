"""The engine's thread and its scheduler: admit, plan, compute, sample, hand out; forever, until closed.

Only this thread touches the model. Whatever goes wrong in a step ends the requests of that step and nothing else.
"""

import math
import threading
import time
from collections import deque

import torch

from adapterhub_lite.errors import EngineClosedError, QueueFullError, ServingError
from adapterhub_lite.serving.engine.request import GenerationChunk
from adapterhub_lite.serving.engine.sequence import GenerationSequence, token_logprob
from adapterhub_lite.serving.model.batch import RowSlice, pack
from adapterhub_lite.serving.model.runner import ModelRunner


class Scheduler:
    """Sequences in rows and sequences in the queue.

    Prompts are read in pieces: at most `busy_chunk` tokens a step, so that those who write do not wait for a long
    prompt, and `idle_chunk` while more requests wait for their first token than for their next. Short prompts that come
    to many who write are read in a step of their own, which is a fraction of the others': one step in `alone_every` at
    most, and only while nobody waits for a row, since what they win in time all together lose in throughput.
    With `whole_prompts` each prompt is read in one piece, the oldest first.
    """

    def __init__(
        self,
        rows: int,
        max_queue: int,
        *,
        whole_prompts: bool = False,
        busy_chunk: int = 64,
        idle_chunk: int = 256,
        alone_every: int = 4,
    ) -> None:
        self.rows: list[GenerationSequence | None] = [None] * rows
        self.waiting: deque[GenerationSequence] = deque()
        self._max_queue = max_queue
        self._whole_prompts = whole_prompts
        self._busy_chunk = busy_chunk
        self._idle_chunk = idle_chunk
        self._alone_every = alone_every
        self._since_alone = alone_every

    def add(self, sequence: GenerationSequence) -> None:
        """Put a sequence into the queue.

        Raises:
            QueueFullError: the queue is full.
        """
        if len(self.waiting) >= self._max_queue + self.rows.count(None):
            raise QueueFullError(f"{self._max_queue} requests are waiting already; try again later.")
        self.waiting.append(sequence)

    @property
    def running(self) -> list[GenerationSequence]:
        """The sequences in rows, in order of row."""
        return [sequence for sequence in self.rows if sequence is not None]

    def admit(self) -> list[GenerationSequence]:
        """Give free rows, lowest first, to waiting sequences; return those sequences."""
        admitted = []
        for row, held in enumerate(self.rows):
            if held is None and self.waiting:
                sequence = self.waiting.popleft()
                sequence.row = row
                self.rows[row] = sequence
                admitted.append(sequence)
        return admitted

    def compact(self) -> list[tuple[GenerationSequence, int]]:
        """Fill holes from the last rows, so that rows in use are neighbours; return (sequence, old row) of each move."""
        moved = []
        running = self.running
        for hole in range(len(running)):
            if self.rows[hole] is None:
                sequence = self.running[-1]
                moved.append((sequence, sequence.row))
                self.rows[sequence.row], self.rows[hole], sequence.row = None, sequence, hole
        return moved

    def leave(self, sequence: GenerationSequence) -> None:
        """Free the sequence's row."""
        assert self.rows[sequence.row] is sequence, "a row belongs to one sequence at a time"
        self.rows[sequence.row] = None

    def plan(self) -> list[RowSlice]:
        """Return what each row computes in the next step, in order of row."""
        running = self.running
        reading = [sequence for sequence in running if sequence.left > 1 or not sequence.output]
        writing = [sequence for sequence in running if sequence not in reading]
        self._since_alone += 1
        short = {sequence.row: sequence.left for sequence in reading if sequence.left <= self._busy_chunk}
        alone = not self.waiting and len(reading) < len(writing) and self._since_alone >= self._alone_every
        if alone and 0 < sum(short.values()) <= self._busy_chunk:
            self._since_alone = 0
            counts = short
        else:
            # Larger pieces cost less a token: while most are still reading, that is what brings everybody on soonest.
            budget = self._busy_chunk if len(writing) >= len(reading) else self._idle_chunk
            counts = {sequence.row: 1 for sequence in writing}
            if reading and self._whole_prompts:
                oldest = min(reading, key=lambda sequence: sequence.admitted)
                counts[oldest.row] = oldest.left
            elif reading:
                counts |= share_prompt_tokens(reading, budget)
        return [
            RowSlice(sequence.row, sequence.computed, sequence.upcoming(counts[sequence.row]))
            for sequence in running
            if counts.get(sequence.row, 0) > 0
        ]


def share_prompt_tokens(reading: list[GenerationSequence], budget: int) -> dict[int, int]:
    """Split a step's budget of prompt tokens by row: a quarter for the oldest, the rest to the shortest first."""
    oldest = min(reading, key=lambda sequence: sequence.admitted)
    shares = {oldest.row: min(max(budget // 4, 1), oldest.left)}
    budget -= shares[oldest.row]
    for sequence in sorted(reading, key=lambda sequence: (sequence.left, sequence.admitted)):
        more = min(budget, sequence.left - shares.get(sequence.row, 0))
        shares[sequence.row] = shares.get(sequence.row, 0) + more
        budget -= more
    return shares


class EngineCore:
    """Runs steps on a thread of its own while there is work."""

    def __init__(self, runner: ModelRunner, end_tokens: frozenset[int], *, max_queue: int) -> None:
        self._runner = runner
        self._end_tokens = end_tokens
        self._scheduler = Scheduler(runner.rows, max_queue, whole_prompts=runner.whole_prompts)
        self._changed = threading.Condition()
        self._closed = False
        self.steps = 0
        self.tokens = 0
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
    def waiting(self) -> int:
        """Requests in the queue now."""
        return len(self._scheduler.waiting)

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
            while self._wait():
                slices = self._scheduler.plan()
                if slices:
                    self._step(slices)
        finally:
            # Reached by an error of our own too: then nobody waits for ever, and `alive` says so.
            with self._changed:
                self._closed = True
                sequences = [*self._scheduler.running, *self._scheduler.waiting]
                self._scheduler.waiting.clear()
            for sequence in sequences:
                sequence.end(EngineClosedError("The engine was closed before the answer was finished."))

    def _wait(self) -> bool:
        """Sleep until there is work, settle who is in which row; False when closed."""
        scheduler = self._scheduler
        with self._changed:
            if not scheduler.waiting and not scheduler.running:
                self._runner.idle()
            while not (self._closed or scheduler.waiting or scheduler.running):
                self._changed.wait()
            if self._closed:
                return False
            now = time.perf_counter()
            for sequence in [*scheduler.running, *scheduler.waiting]:
                error = sequence.overdue(now)
                if error is not None:
                    if sequence.row >= 0:
                        self._leave(sequence)
                    else:
                        scheduler.waiting.remove(sequence)
                    sequence.end(error)
            admitted = scheduler.admit()
        for sequence, old_row in scheduler.compact():
            self._runner.move(old_row, sequence.row, sequence.route.parts, sequence.computed)
        for sequence in admitted:
            started = time.perf_counter()
            self._runner.admit(sequence.row, sequence.route.parts, len(sequence.prompt_ids) + sequence.limit)
            sequence.admitted = time.perf_counter()
            sequence.placing = sequence.admitted - started
        return True

    def _step(self, slices: list[RowSlice]) -> None:
        sequences = [
            sequence for sequence in self._scheduler.running if any(part.row == sequence.row for part in slices)
        ]
        try:
            logits = self._runner.forward(pack(slices, self._runner.device)).cpu()
        except Exception as error:
            for sequence in sequences:
                self._fail(sequence, error)
            return
        self.steps += 1
        for index, (sequence, part) in enumerate(zip(sequences, slices, strict=True)):
            sequence.computed += len(part.token_ids)
            if sequence.computed == sequence.known:
                try:
                    self._advance(sequence, logits[index])
                except Exception as error:
                    self._fail(sequence, error)

    def _fail(self, sequence: GenerationSequence, error: Exception) -> None:
        failure = ServingError(f"The model failed on this request: {type(error).__name__}: {error}")
        failure.__cause__ = error
        if self._scheduler.rows[sequence.row] is sequence:
            self._runner.cache.spoil(sequence.row)
            self._leave(sequence)
        sequence.end(failure)

    def _leave(self, sequence: GenerationSequence) -> None:
        self._runner.leave(sequence.row)
        self._scheduler.leave(sequence)

    def _advance(self, sequence: GenerationSequence, logits: torch.Tensor) -> None:
        """Choose the sequence's next token, hand out its text, and end the sequence when it is finished."""
        if not math.isfinite(logits.max()):
            raise ServingError("the logits are not finite; the adapter or the blend's weights are out of range")
        token = sequence.sampler.choose(logits)
        if not sequence.output:
            sequence.first_token = time.perf_counter()
        sequence.output.append(token)
        self.tokens += 1
        if sequence.request.logprobs is not None:
            sequence.logprobs.append(token_logprob(logits, token, sequence.request.logprobs))
        piece = sequence.stream.push(token)
        reason = None
        if token in self._end_tokens or sequence.stream.stopped:
            reason = "stop"
        elif len(sequence.output) >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._leave(sequence)
            # The held-back text goes with the last chunk; the piece before it is the same answer.
            if piece:
                sequence.outbox.put(GenerationChunk(piece))
            sequence.end(reason)
        elif piece:
            sequence.outbox.put(GenerationChunk(piece))
