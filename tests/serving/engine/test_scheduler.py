"""Who computes what: budgets, shares, holes. With jobs that have prompts and nothing else."""

from typing import Any

import pytest

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving import GenerationRequest
from adapterhub_lite.serving.adapters.pool import Route
from adapterhub_lite.serving.engine.sampling import Sampler
from adapterhub_lite.serving.engine.scheduling import Scheduler
from adapterhub_lite.serving.engine.sequence import GenerationSequence


def job(prompt: int, written: int = 0, admitted: float = 0.0) -> GenerationSequence:
    request = GenerationRequest(prompt="x")
    stream: Any = None
    made = GenerationSequence(
        request, list(range(prompt)), Route(), Sampler(request, []), stream, "base", 0.0, 100, admitted=admitted
    )
    made.output = list(range(written))
    made.computed = prompt + written - 1 if written else 0
    return made


def scheduler(*jobs: GenerationSequence, rows: int = 4) -> Scheduler:
    made = Scheduler(rows, max_queue=10, busy_chunk=64, idle_chunk=256)
    for one in jobs:
        made.add(one)
    made.admit()
    return made


def sizes(made: Scheduler) -> dict[int, int]:
    return {part.row: len(part.token_ids) for part in made.plan()}


def test_writers_get_one_token_and_readers_share_the_rest() -> None:
    writers = [job(5, written=2) for _ in range(3)]
    made = scheduler(*writers, job(1000), job(10), job(20), rows=6)
    assert sizes(made) == {0: 1, 1: 1, 2: 1, 3: 64 - 10 - 20, 4: 10, 5: 20}


def test_the_oldest_prompt_always_gets_on() -> None:
    writers = [job(5, written=2) for _ in range(3)]
    made = scheduler(*writers, job(1000, admitted=1), job(500, admitted=2), job(60, admitted=3), rows=6)
    assert sizes(made) == {0: 1, 1: 1, 2: 1, 3: 16, 5: 48}


def test_while_most_are_still_reading_the_pieces_are_larger() -> None:
    made = scheduler(job(5, written=2), job(1000, admitted=1), job(500, admitted=2), job(60, admitted=3))
    assert sizes(made) == {0: 1, 1: 64, 2: 132, 3: 60}


def test_alone_a_prompt_is_read_in_larger_pieces() -> None:
    made = scheduler(job(1000))
    assert sizes(made) == {0: 256}
    (part,) = made.plan()
    assert (part.start, list(part.token_ids[:2])) == (0, [0, 1])


def test_a_writer_computes_its_last_token_at_the_right_place() -> None:
    (part,) = scheduler(job(5, written=3)).plan()
    assert (part.start, list(part.token_ids)) == (7, [2])


def test_a_short_prompt_among_writers_has_a_step_of_its_own_but_not_every_step() -> None:
    writers = [job(5, written=2) for _ in range(3)]
    made = scheduler(*writers, job(30), job(1000), rows=8)
    assert sizes(made) == {3: 30}, "not a token for the long prompt, which goes on in the next step"
    for _ in range(3):
        assert sizes(made) == {0: 1, 1: 1, 2: 1, 3: 30, 4: 34}, "the writers go on, whoever comes"
    assert sizes(made) == {3: 30}


@pytest.mark.parametrize(
    ("writers", "prompts", "waiting"), [(2, [20, 20], 0), (3, [65], 0), (3, [40, 40], 0), (7, [4], 1)]
)
def test_a_prompt_shares_its_step_where_that_is_better(writers: int, prompts: list[int], waiting: int) -> None:
    """With as many readers as writers, when it is long, when together they are, when somebody waits for a row."""
    jobs = [job(5, written=2) for _ in range(writers)] + [job(count) for count in prompts]
    made = scheduler(*jobs, *(job(4) for _ in range(waiting)), rows=writers + len(prompts))
    assert len(made.waiting) == waiting
    assert {row: size for row, size in sizes(made).items() if row < writers} == dict.fromkeys(range(writers), 1)


def test_holes_are_filled_by_new_jobs_first_and_then_from_the_end() -> None:
    jobs = [job(3) for _ in range(4)]
    made = scheduler(*jobs)
    made.leave(jobs[0])
    made.leave(jobs[1])
    fresh = job(9)
    made.add(fresh)
    assert made.admit() == [fresh] and fresh.row == 0
    assert made.compact() == [(jobs[3], 3)] and jobs[3].row == 1
    assert [one.row for one in made.running] == [0, 1, 2] and made.compact() == []


def test_queue_is_bounded_beyond_the_free_rows() -> None:
    made = scheduler(rows=2)
    for _ in range(12):
        made.add(job(1))
    with pytest.raises(QueueFullError):
        made.add(job(1))
