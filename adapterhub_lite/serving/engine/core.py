"""The engine's thread and its scheduler: admit, plan, compute, sample, hand out; forever, until closed.

Only this thread touches the model. Memory for keys and values is granted before a request gets a row: one that does not
fit now waits. Whatever goes wrong for one request ends that one; where a step fails, each row computes its part alone.
A failure of the loop itself ends the requests in rows, once; the next one within `FORGIVEN_SECONDS` ends the engine.
"""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator

import torch

from adapterhub_lite.errors import EngineClosedError, QueueFullError, ResourceError, ServingError
from adapterhub_lite.serving.engine.request import GenerationChunk
from adapterhub_lite.serving.engine.sequence import GenerationSequence, token_logprob
from adapterhub_lite.serving.model.kv_cache import RowSlice, pack
from adapterhub_lite.serving.model.runner import ModelRunner

logger = logging.getLogger("adapterhub.engine")
# Tokens that a tenant may take up, prompts and answers, each time that its turn comes.
QUANTUM = 512
# How many others may be admitted before a request that waits for memory: then none is until it fits.
PATIENCE = 64
FORGIVEN_SECONDS = 600.0


class FairQueue:
    """Waiting sequences by tenant, taken by deficit round robin (Shreedhar and Varghese, SIGCOMM 1995).

    The tenants take turns; at each turn one may take sequences worth `QUANTUM` tokens more, and keeps what it did not
    use while it waits. So each gets the same share of tokens, whatever the number and the size of its requests.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[GenerationSequence]] = OrderedDict()
        self._deficit: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[GenerationSequence]:
        return (sequence for queue in self._of.values() for sequence in queue)

    def append(self, sequence: GenerationSequence) -> None:
        """Put a sequence behind those of its tenant."""
        tenant = sequence.request.tenant
        self._of.setdefault(tenant, deque()).append(sequence)
        self._deficit.setdefault(tenant, 0)

    def remove(self, sequence: GenerationSequence) -> None:
        """Take a sequence out of turn."""
        tenant = sequence.request.tenant
        self._of[tenant].remove(sequence)
        if not self._of[tenant]:
            del self._of[tenant], self._deficit[tenant]

    def clear(self) -> None:
        """Forget them all."""
        self._of.clear()
        self._deficit.clear()

    def heads(self) -> list[GenerationSequence]:
        """The next sequence of each tenant."""
        return [queue[0] for queue in self._of.values()]

    def by_tenant(self) -> dict[str, int]:
        """How many sequences of each tenant wait."""
        return {tenant: len(queue) for tenant, queue in self._of.copy().items()}

    def take(self, allowed: Collection[str]) -> GenerationSequence | None:
        """Take the next sequence in turn, of the waiting tenants that are `allowed`; None when there is none."""
        while allowed:
            tenant = next(iter(self._of))
            head = self._of[tenant][0]
            if tenant in allowed and self._deficit[tenant] >= head.need:
                self._deficit[tenant] -= head.need
                self.remove(head)
                return head
            if tenant in allowed:
                self._deficit[tenant] += QUANTUM
            self._of.move_to_end(tenant)
        return None


class Scheduler:
    """Sequences in rows and sequences in the queue.

    Prompts are read in pieces: at most `busy_chunk` tokens per step, so that those who write do not wait for a long
    prompt, and `idle_chunk` while more requests wait for their first token than for their next. Short prompts that come
    to many who write are read in a step of their own, which is a fraction of the others': one step in `alone_every` at
    most, and only while nobody waits for a row, since what they win in time all together lose in throughput.
    With `whole_prompts` each prompt is read in one piece, the oldest first.

    The last `spare` rows are for tenants that have no row: whoever fills the others delays nobody else's first token.
    """

    def __init__(
        self,
        rows: int,
        max_queue: int,
        *,
        spare: int = 0,
        whole_prompts: bool = False,
        busy_chunk: int = 64,
        idle_chunk: int = 256,
        alone_every: int = 4,
    ) -> None:
        self.rows: list[GenerationSequence | None] = [None] * rows
        self.waiting = FairQueue()
        self._spare = spare
        self._max_queue = max_queue
        self._whole_prompts = whole_prompts
        self._busy_chunk = busy_chunk
        self._idle_chunk = idle_chunk
        self._alone_every = alone_every
        self._since_alone = alone_every

    def add(self, sequence: GenerationSequence) -> None:
        """Put a sequence into the queue.

        A tenant that has nothing here yet finds the spare rows and some places more, so nobody fills the queue alone.

        Raises:
            QueueFullError: the queue is full.
        """
        free = self.rows.count(None)
        places = self._max_queue + max(0, free - self._spare)
        known = self.waiting.by_tenant().keys() | {one.request.tenant for one in self.running}
        if sequence.request.tenant not in known:
            places += min(free, self._spare) + self._max_queue // 8
        if len(self.waiting) >= places:
            raise QueueFullError(f"{self._max_queue} requests are waiting already; try again later.")
        self.waiting.append(sequence)

    @property
    def running(self) -> list[GenerationSequence]:
        """The sequences in rows, in order of row."""
        return [sequence for sequence in self.rows if sequence is not None]

    def admit(self, most_rows: Callable[[int], int] | None = None) -> list[GenerationSequence]:
        """Give free rows, lowest first, to waiting sequences; return those sequences.

        `most_rows` says how many rows of so many tokens have room for their keys and values.
        """
        most_rows = most_rows or (lambda _: len(self.rows))
        admitted: list[GenerationSequence] = []
        while self.waiting and None in self.rows:
            running = self.running
            longest = max((sequence.need for sequence in running), default=0)
            heads = {head.request.tenant: head for head in self.waiting.heads()}
            fitting = {t for t, head in heads.items() if len(running) < most_rows(max(longest, head.need))}
            late = {tenant for tenant, head in heads.items() if head.passed_over >= PATIENCE}
            # What has been passed over for long enough goes first, and nothing else goes until it fits.
            allowed = fitting & late if late else fitting
            if not running:
                allowed = allowed or set(heads)
            elif len(running) >= len(self.rows) - self._spare:
                allowed -= {sequence.request.tenant for sequence in running}
            sequence = self.waiting.take(allowed)
            if sequence is None:
                return admitted
            for tenant, head in heads.items():
                head.passed_over += tenant not in fitting
            sequence.row = self.rows.index(None)
            self.rows[sequence.row] = sequence
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
    """Split a step's budget of prompt tokens by row: a quarter for the oldest, the rest to the shortest first.

    With several tenants each first has its part of the rest.
    """
    oldest = min(reading, key=lambda sequence: sequence.admitted)
    shares = {oldest.row: min(max(budget // 4, 1), oldest.left)}
    budget -= shares[oldest.row]
    shortest_first = sorted(reading, key=lambda sequence: (sequence.left, sequence.admitted))
    tenants = {sequence.request.tenant for sequence in reading}
    parts = dict.fromkeys(tenants, budget // len(tenants)) if len(tenants) > 1 else {}
    for own_part in (True, False):
        for sequence in shortest_first:
            most = parts.get(sequence.request.tenant, 0) if own_part else budget
            more = min(most, budget, sequence.left - shares.get(sequence.row, 0))
            shares[sequence.row] = shares.get(sequence.row, 0) + more
            budget -= more
            if own_part and parts:
                parts[sequence.request.tenant] -= more
    return shares


class EngineCore:
    """Runs steps on a thread of its own while there is work."""

    def __init__(self, runner: ModelRunner, end_tokens: frozenset[int], *, max_queue: int, spare_rows: int = 0) -> None:
        self._runner = runner
        self._end_tokens = end_tokens
        self._scheduler = Scheduler(runner.rows, max_queue, spare=spare_rows, whole_prompts=runner.whole_prompts)
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
                        slices = self._scheduler.plan()
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
            if not scheduler.waiting and not scheduler.running:
                self._runner.idle()
            while not (self._closed or scheduler.waiting or scheduler.running):
                self._changed.wait()
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
            admitted = scheduler.admit(self._runner.most_rows)
        for sequence, old_row in scheduler.compact():
            if sequence not in admitted:
                try:
                    self._runner.move(old_row, sequence.row, sequence.route.parts, sequence.computed)
                except Exception as error:
                    self._fail(sequence, error)
        for sequence in admitted:
            started = time.perf_counter()
            try:
                longest = max(one.need for one in scheduler.running)
                self._runner.admit(sequence.row, sequence.route.parts, longest)
            except Exception as error:
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
        for index, (sequence, part) in enumerate(zip(sequences, slices, strict=True)):
            sequence.computed += len(part.token_ids)
            if sequence.computed == sequence.known:
                try:
                    self._advance(sequence, logits[index])
                except Exception as error:
                    self._fail(sequence, error)

    def _fail(self, sequence: GenerationSequence, error: Exception) -> None:
        """End a sequence that something went wrong for."""
        failure: ServingError | ResourceError
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            failure = ResourceError(
                "There is not enough memory for this request now; try again later, or ask for less."
            )
        else:
            failure = ServingError(f"The model failed on this request: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._end_in_row(sequence, failure)

    def _end_in_row(self, sequence: GenerationSequence, failure: BaseException) -> None:
        row = sequence.row
        if self._scheduler.rows[row] is sequence:
            self._scheduler.leave(sequence)
            try:
                self._runner.cache.spoil(row)
                self._runner.leave(row)
            except Exception:
                logger.exception("A row could not be cleared; it is when it is used again.")
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
        # An empty set writes every answer to its full length, an adapter's with an end of its own too.
        own = sequence.route.end_tokens if self._end_tokens else None
        if token in (self._end_tokens if own is None else own) or sequence.stream.stopped:
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
