"""The engine's thread: admit, plan, compute, sample, hand out; forever, until closed.

Only this thread touches the trunk. Whatever goes wrong in a step ends the requests of that step and nothing else.
"""

import math
import threading
import time
from collections.abc import Callable

import torch

from adapterhub_lite.errors import EngineClosedError, ServingError
from adapterhub_lite.serving.engine.request import GenerationChunk
from adapterhub_lite.serving.engine.sampling import token_logprob
from adapterhub_lite.serving.engine.scheduler import Scheduler
from adapterhub_lite.serving.engine.sequence import Job
from adapterhub_lite.serving.model.batch import RowSlice, pack
from adapterhub_lite.serving.model.runner import Trunk


class EngineLoop:
    """Runs steps on a thread of its own while there is work."""

    def __init__(self, trunk: Trunk, end_tokens: frozenset[int], *, max_queue: int) -> None:
        self._trunk = trunk
        self._end_tokens = end_tokens
        self._scheduler = Scheduler(trunk.rows, max_queue)
        self._changed = threading.Condition()
        self._closed = False
        self.steps = 0
        self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="adapterhub-engine", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: the queue is full.
            EngineClosedError: the engine is closed.
        """
        with self._changed:
            if self._closed:
                raise EngineClosedError("The engine is closed; start another one.")
            self._scheduler.add(job)
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
        """Look again at once: a job was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Stop after the step in progress and end every job with EngineClosedError."""
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
                jobs = [*self._scheduler.running, *self._scheduler.waiting]
                self._scheduler.waiting.clear()
            for job in jobs:
                job.end(EngineClosedError("The engine was closed before the answer was finished."))

    def _wait(self) -> bool:
        """Sleep until there is work, settle who is in which row; False when closed."""
        scheduler = self._scheduler
        with self._changed:
            if not scheduler.waiting and not scheduler.running:
                self._trunk.idle()
            while not (self._closed or scheduler.waiting or scheduler.running):
                self._changed.wait()
            if self._closed:
                return False
            self._drop_overdue()
            admitted = scheduler.admit()
        for job, old_row in scheduler.compact():
            self._trunk.cache.move(old_row, job.row, job.computed)
            self._trunk.bank.leave(old_row)
            self._trunk.bank.place(job.row, job.route.parts)
        for job in admitted:
            self._admit(job)
        return True

    def _drop_overdue(self) -> None:
        now = time.perf_counter()
        for job in [*self._scheduler.running, *self._scheduler.waiting]:
            error = job.overdue(now)
            if error is not None:
                if job.row >= 0:
                    self._leave(job)
                else:
                    self._scheduler.waiting.remove(job)
                job.end(error)

    def _admit(self, job: Job) -> None:
        started = time.perf_counter()
        self._trunk.cache.reserve(len(job.prompt_ids) + job.limit)
        self._trunk.bank.place(job.row, job.route.parts)
        job.admitted = time.perf_counter()
        job.placing = job.admitted - started

    def _step(self, slices: list[RowSlice]) -> None:
        jobs = [job for job in self._scheduler.running if any(part.row == job.row for part in slices)]
        try:
            logits = self._trunk.forward(pack(slices, self._trunk.device)).cpu()
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        self.steps += 1
        for index, (job, part) in enumerate(zip(jobs, slices, strict=True)):
            job.computed += len(part.token_ids)
            if job.computed == job.known:
                self._guard(job, self._advance, logits[index])

    def _guard(self, job: Job, action: Callable[[Job, torch.Tensor], None], logits: torch.Tensor) -> None:
        try:
            action(job, logits)
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        failure = ServingError(f"The model failed on this request: {type(error).__name__}: {error}")
        failure.__cause__ = error
        if self._scheduler.rows[job.row] is job:
            self._trunk.cache.spoil(job.row)
            self._leave(job)
        job.end(failure)

    def _leave(self, job: Job) -> None:
        self._trunk.bank.leave(job.row)
        self._scheduler.leave(job)

    def _advance(self, job: Job, logits: torch.Tensor) -> None:
        """Choose the job's next token, hand out its text, and end the job when it is finished."""
        if not math.isfinite(logits.max()):
            raise ServingError("the logits are not finite; the adapter or the blend's weights are out of range")
        token = job.sampler.choose(logits)
        if not job.output:
            job.first_token = time.perf_counter()
        job.output.append(token)
        self.tokens += 1
        if job.request.logprobs is not None:
            job.logprobs.append(token_logprob(logits, token, job.request.logprobs))
        piece = job.stream.push(token)
        reason = self._reason(job, token)
        if reason is not None:
            self._leave(job)
            # The held-back text goes with the last chunk; the piece before it is the same answer.
            if piece:
                job.outbox.put(GenerationChunk(piece))
            job.end(reason)
        elif piece:
            job.outbox.put(GenerationChunk(piece))

    def _reason(self, job: Job, token: int) -> str | None:
        if token in self._end_tokens or job.stream.stopped:
            return "stop"
        return "length" if len(job.output) >= job.limit else None
