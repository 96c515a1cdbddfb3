"""Who computes what in the next step: rows for waiting requests, one token for each that writes, a share of a prompt.

Knows jobs and rows; nothing of models. Only the engine's thread calls it, but for `add`.
"""

from collections import deque

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving.engine.sequence import Job
from adapterhub_lite.serving.model.batch import RowSlice


class Scheduler:
    """Jobs in rows and jobs in the queue.

    Prompts are read in pieces: at most `busy_chunk` tokens a step, so that those who write do not wait for a long
    prompt, and `idle_chunk` while more requests wait for their first token than for their next. Short prompts that come
    to many who write are read in a step of their own, which is a fraction of the others': one step in `alone_every` at
    most, and only while nobody waits for a row, since what they win in time all together lose in throughput.
    """

    def __init__(
        self, rows: int, max_queue: int, *, busy_chunk: int = 64, idle_chunk: int = 256, alone_every: int = 4
    ) -> None:
        self.rows: list[Job | None] = [None] * rows
        self.waiting: deque[Job] = deque()
        self._max_queue = max_queue
        self._busy_chunk = busy_chunk
        self._idle_chunk = idle_chunk
        self._alone_every = alone_every
        self._since_alone = alone_every

    def add(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFullError: the queue is full.
        """
        if len(self.waiting) >= self._max_queue + self.rows.count(None):
            raise QueueFullError(f"{self._max_queue} requests are waiting already; try again later.")
        self.waiting.append(job)

    @property
    def running(self) -> list[Job]:
        """The jobs in rows, in order of row."""
        return [job for job in self.rows if job is not None]

    def admit(self) -> list[Job]:
        """Give free rows, lowest first, to waiting jobs; return those jobs."""
        admitted = []
        for row, held in enumerate(self.rows):
            if held is None and self.waiting:
                job = self.waiting.popleft()
                job.row = row
                self.rows[row] = job
                admitted.append(job)
        return admitted

    def compact(self) -> list[tuple[Job, int]]:
        """Fill holes with the jobs of the last rows, so that rows in use are neighbours; return (job, old row)."""
        moved = []
        running = self.running
        for hole in range(len(running)):
            if self.rows[hole] is None:
                job = self.running[-1]
                moved.append((job, job.row))
                self.rows[job.row], self.rows[hole], job.row = None, job, hole
        return moved

    def leave(self, job: Job) -> None:
        """Free the job's row."""
        assert self.rows[job.row] is job, "a row belongs to one job at a time"
        self.rows[job.row] = None

    def plan(self) -> list[RowSlice]:
        """Return what each row computes in the next step, in order of row."""
        running = self.running
        reading = [job for job in running if job.known - job.computed > 1 or not job.output]
        writing = [job for job in running if job not in reading]
        self._since_alone += 1
        counts = self._short_ones_alone(reading, writing)
        if not counts:
            # Larger pieces cost less a token: while most are still reading, that is what brings everybody on soonest.
            budget = self._busy_chunk if len(writing) >= len(reading) else self._idle_chunk
            counts = {job.row: 1 for job in writing} | _shares(reading, budget)
        return [
            RowSlice(job.row, job.computed, job.upcoming(counts[job.row]))
            for job in running
            if counts.get(job.row, 0) > 0
        ]

    def _short_ones_alone(self, reading: list[Job], writing: list[Job]) -> dict[int, int]:
        """The whole of each short prompt by row, when the next step is to be theirs; else nothing."""
        if self.waiting or len(reading) >= len(writing) or self._since_alone < self._alone_every:
            return {}
        short = {job.row: job.known - job.computed for job in reading if job.known - job.computed <= self._busy_chunk}
        if not 0 < sum(short.values()) <= self._busy_chunk:
            return {}
        self._since_alone = 0
        return short


def _shares(reading: list[Job], budget: int) -> dict[int, int]:
    """Split the budget of prompt tokens: a quarter for the oldest, the rest to the shortest first."""
    shares: dict[int, int] = {}
    if not reading:
        return shares
    oldest = min(reading, key=lambda job: job.admitted)
    shares[oldest.row] = min(max(budget // 4, 1), oldest.known - oldest.computed)
    budget -= shares[oldest.row]
    for job in sorted(reading, key=lambda job: (job.known - job.computed, job.admitted)):
        more = min(budget, job.known - job.computed - shares.get(job.row, 0))
        shares[job.row] = shares.get(job.row, 0) + more
        budget -= more
    return shares
