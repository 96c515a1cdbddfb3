"""Whoever fills the server never shuts the others out; counted in prompts, with limits per key."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.serving.api.auth import Caller
from adapterhub_lite.serving.api.dispatch import Shares
from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.web.rates import Budget


def tenant(name: str) -> Caller:
    return Caller("anyone", tenant=name)


def test_one_tenant_may_fill_the_server_and_another_still_gets_its_share() -> None:
    shares = Shares(64)
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(shares.take(tenant("a"), 16))
        with pytest.raises(ApiRefusal, match="64 prompts in work") as refused:
            held.enter_context(shares.take(tenant("a"), 1))
        assert refused.value.status == 429
        for _ in range(2):
            held.enter_context(shares.take(tenant("b"), 16))
        with pytest.raises(ApiRefusal, match="96 prompts are in work"):
            held.enter_context(shares.take(tenant("b"), 1))
        held.enter_context(shares.take(tenant("c"), 1))
    assert not shares.in_work


def test_what_never_fits_is_told_so_and_is_no_429() -> None:
    with pytest.raises(ApiRefusal, match="at most 8 at once") as refused, Shares(8).take(tenant("a"), 9):
        pass
    assert refused.value.status == 400


def test_a_key_has_limits_of_its_own() -> None:
    seconds = [0.0]
    shares = Shares(64, clock=lambda: seconds[0])
    caller = Caller("key-1", tenant="key-1", requests_in_work=1, tokens_per_minute=60)
    with shares.take(caller, 16), pytest.raises(ApiRefusal, match="1 requests in work"):  # noqa: SIM117
        with shares.take(caller, 1):
            pass
    shares.spend(caller, 90)  # thirty more than there were: half a minute until there is one again
    with pytest.raises(ApiRefusal, match="tokens per minute") as refused, shares.take(caller, 1):
        pass
    assert refused.value.retry_after == 31
    seconds[0] = 31.0
    with shares.take(caller, 1):
        pass


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 500)), max_size=30))
def test_a_budget_never_gives_more_than_its_rate(spending: list[tuple[float, int]]) -> None:
    """Whatever the order of waits and expenses: what is spent is at most a minute's worth, the rate, and one debt."""
    now, spent, largest = 0.0, 0, 0
    budget = Budget(60, now)
    for wait, tokens in spending:
        now += wait
        if budget.seconds_to_wait(now) == 0:
            budget.spend(tokens)
            spent, largest = spent + tokens, max(largest, tokens)
    assert spent <= 60 + now + largest


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 16), st.booleans()), max_size=60))
def test_counts_come_back_to_nothing_and_stay_within_twice_the_limit(steps: list[tuple[str, int, bool]]) -> None:
    shares, held = Shares(16), list[ExitStack]()
    for name, prompts, leave in steps:
        if leave and held:
            held.pop(0).close()
            continue
        stack = ExitStack()
        try:
            stack.enter_context(shares.take(tenant(name), prompts))
        except ApiRefusal:
            assert shares.in_work.total() + prompts > 16, "refused though there was room"
            continue
        held.append(stack)
        assert shares.in_work.total() <= 32
        assert max(shares.in_work.values()) <= 16
    for stack in held:
        stack.close()
    assert not shares.in_work
