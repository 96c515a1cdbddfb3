"""Which requests get rows, and what each row computes in the next step."""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving.engine.sequence import GenerationSequence
from adapterhub_lite.serving.model.packed_step import RowSlice

# Tokens that a tenant may take up, prompts and answers, each time that its turn comes.
QUANTUM = 512
# How many others may be admitted before a request that waits for memory: then none is until it fits.
PATIENCE = 64


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

    def admit(self, fits: Callable[[Sequence[int]], bool] | None = None) -> list[GenerationSequence]:
        """Give free rows, lowest first, to waiting sequences; return those sequences.

        `fits` says whether rows of so many tokens have room for their keys and values, all together.
        """
        fits = fits or (lambda _: True)
        admitted: list[GenerationSequence] = []
        while self.waiting and None in self.rows:
            running = self.running
            needs = [sequence.need for sequence in running]
            heads = {head.request.tenant: head for head in self.waiting.heads()}
            fitting = {t for t, head in heads.items() if fits([*needs, head.need])}
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
        running = [sequence for sequence in self.running if sequence.leader is None]
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
        return [sequence.slice(counts[sequence.row]) for sequence in running if counts.get(sequence.row, 0) > 0]


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
