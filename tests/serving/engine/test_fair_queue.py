"""Whose turn it is: deficit round robin over tenants, spare rows for newcomers, memory granted before a row is."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.errors import QueueFullError
from adapterhub_lite.serving import GenerationRequest
from adapterhub_lite.serving.adapters.pool import Route
from adapterhub_lite.serving.engine.sampling import Sampler
from adapterhub_lite.serving.engine.scheduling import PATIENCE, QUANTUM, FairQueue, Scheduler, share_prompt_tokens
from adapterhub_lite.serving.engine.sequence import GenerationSequence


def job(tenant: str, need: int = 100, prompt: int = 10) -> GenerationSequence:
    request = GenerationRequest(prompt="x", tenant=tenant)
    stream: object = None
    return GenerationSequence(
        request,
        list(range(prompt)),
        Route(),
        Sampler(request, []),
        stream,
        "base",
        0.0,
        need - prompt,  # type: ignore[arg-type]
    )


def taken(queue: FairQueue) -> list[str]:
    order = []
    while (one := queue.take({head.request.tenant for head in queue.heads()})) is not None:
        order.append(one.request.tenant)
    return order


def test_a_newcomer_does_not_wait_for_a_crowd() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.append(job("a", need=QUANTUM))
    queue.append(job("b", need=QUANTUM))
    assert "b" in taken(queue)[:3]
    assert not len(queue)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(11, 2000)), min_size=1, max_size=80))
def test_each_gets_the_same_share_of_tokens(jobs: list[tuple[str, int]]) -> None:
    """While two tenants both wait, what one was given is never more than a turn and a request ahead of the other."""
    queue, left = FairQueue(), Counter[str]()
    for tenant, need in jobs:
        queue.append(job(tenant, need))
        left[tenant] += 1
    largest = max(need for _, need in jobs)
    given_tokens: Counter[str] = Counter()
    while len(queue):
        waiting = {head.request.tenant for head in queue.heads()}
        one = queue.take(waiting)
        assert one is not None
        given_tokens[one.request.tenant] += one.need
        left[one.request.tenant] -= 1
        for first in waiting:
            for second in waiting:
                if left[first] and left[second]:
                    assert given_tokens[first] - given_tokens[second] <= 2 * (QUANTUM + largest)


def scheduler(*jobs: GenerationSequence, rows: int, spare: int = 0) -> Scheduler:
    made = Scheduler(rows, max_queue=1000, spare=spare)
    for one in jobs:
        made.add(one)
    return made


def test_spare_rows_are_for_who_has_none() -> None:
    made = scheduler(*(job("a") for _ in range(20)), rows=6, spare=2)
    assert len(made.admit()) == 4
    for tenant in ("b", "b", "c", "d"):
        made.add(job(tenant))
    assert {one.request.tenant for one in made.admit()} == {"b", "c"}
    assert made.rows.count(None) == 0
    made.leave(made.running[0])
    assert [one.request.tenant for one in made.admit()] == ["d"], "of five in use the last ones are spare"


def test_what_has_no_room_for_its_keys_and_values_waits_and_lets_others_pass() -> None:
    made = scheduler(job("a", need=400), job("long", need=5000), job("b", need=400), rows=4)

    def fits(needs: Sequence[int]) -> bool:
        return sum(needs) <= 5500

    assert {one.request.tenant for one in made.admit(fits)} == {"a", "b"}
    for one in made.running:
        made.leave(one)
    assert [one.request.tenant for one in made.admit(fits)] == ["long"]
    made.add(job("a", need=400))
    made.add(job("b", need=501))
    assert [one.request.tenant for one in made.admit(fits)] == ["a"], "a short one has room beside the long one"


def test_what_waits_for_memory_is_not_passed_over_for_ever() -> None:
    made = scheduler(job("long", need=5000), rows=2)
    made.add(job("a"))

    def fits(needs: Sequence[int]) -> bool:
        return sum(needs) <= 5000

    passed = 0
    while not any(one.request.tenant == "long" for one in made.admit(fits) or made.running):
        for one in made.running[:1]:
            made.leave(one)
        made.add(job("a"))
        passed += 1
        assert passed <= 3 * PATIENCE
    assert [one.request.tenant for one in made.running] == ["long"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 900)), min_size=1, max_size=12), st.integers(16, 256))
def test_prompt_tokens_are_shared_whole_and_within_the_budget(prompts: list[tuple[str, int]], budget: int) -> None:
    reading = [job(tenant, need=length + 5, prompt=length) for tenant, length in prompts]
    for row, one in enumerate(reading):
        one.row = row
    shares = share_prompt_tokens(reading, budget)
    assert sum(shares.values()) == min(budget, sum(length for _, length in prompts))
    assert all(0 <= shares[one.row] <= one.left for one in reading)


def test_a_short_prompt_is_read_beside_another_tenants_long_ones() -> None:
    reading = [job("a", need=45, prompt=40) for _ in range(16)] + [job("b", need=55, prompt=50)]
    for row, one in enumerate(reading):
        one.row, one.admitted = row, float(row)
    assert share_prompt_tokens(reading, 128)[16] >= 48


def test_a_crowd_leaves_places_in_the_queue_for_a_newcomer() -> None:
    made = Scheduler(2, max_queue=16, spare=1)
    with pytest.raises(QueueFullError):
        for _ in range(100):
            made.add(job("a"))
    assert len(made.waiting) == 16 + 1  # the queue, and the row that is not spare
    for newcomer in ("b", "c"):
        made.add(job(newcomer))
    with pytest.raises(QueueFullError):
        made.add(job("b"))
