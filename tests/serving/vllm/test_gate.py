"""Requests that must be computed alone are, and all the others still run beside each other."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.serving import GenerationRequest, GenerationResult
from adapterhub_lite.serving.vllm.engine import VllmEngine
from adapterhub_lite.serving.vllm.gate import Gate
from tests.serving.vllm.pretend import PretendVllm

# alone, rounds of the loop inside, and after how many it is cancelled
VISITS = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.none() | st.integers(0, 6)), max_size=12)


@given(visits=VISITS)
def test_nobody_is_inside_with_one_that_is_alone_and_everybody_gets_in(
    visits: list[tuple[bool, int, int | None]],
) -> None:
    inside: list[tuple[int, bool]] = []
    been: list[int] = []

    async def visit(gate: Gate, number: int, alone: bool, rounds: int) -> None:
        async with gate.enter(alone=alone):
            inside.append((number, alone))
            been.append(number)
            assert len(inside) == 1 or not any(one for _, one in inside)
            try:
                for _ in range(rounds):
                    await asyncio.sleep(0)
            finally:
                inside.remove((number, alone))

    async def main() -> None:
        gate = Gate()
        tasks = [asyncio.create_task(visit(gate, at, one[0], one[1])) for at, one in enumerate(visits)]
        for turn in range(8):
            for task, (_, _, end) in zip(tasks, visits, strict=True):
                if end == turn:
                    task.cancel()
            await asyncio.sleep(0)
        for told in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 300):
            assert told is None or isinstance(told, asyncio.CancelledError), told
        async with gate.enter(alone=True):
            pass

    # On a thread of its own: a browser that an earlier test left on this one keeps a loop there.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(main())).result()
    assert been == sorted(been)  # in the order in which they came
    assert {at for at, one in enumerate(visits) if one[2] is None} <= set(been)


def ask(engine: VllmEngine) -> list[GenerationResult | AdapterHubError | None]:
    """Answers, streamed or whole, labels, and prompts' log-probabilities, all at once."""
    asked = [
        GenerationRequest(prompt=f"ab{at}", max_new_tokens=3, seed=at % 2, **more)
        for at in range(6)
        for more in ({}, {"labels": ("x", "yz")}, {"prompt_logprobs": 1})
    ]

    def one(request: GenerationRequest) -> GenerationResult | AdapterHubError | None:
        try:
            return engine.generate(request) if request.seed else list(engine.submit(request))[-1].result
        except AdapterHubError as error:
            return error

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


def test_on_a_cpu_vllm_scores_prompts_one_at_a_time(
    pretend: Callable[..., PretendVllm], before: Callable[..., VllmEngine]
) -> None:
    plain = ask(before(pretend()))
    alone = ask(before(pretend(on_cpu=True), scores_alone=True))
    for one, other in zip(plain, alone, strict=True):
        assert isinstance(one, GenerationResult) and isinstance(other, GenerationResult), other
        assert (one.text, one.label_logprobs, one.prompt_logprobs) == (
            other.text, other.label_logprobs, other.prompt_logprobs
        )  # fmt: skip


def test_labels_go_over_together_where_that_is_no_danger(vllm: PretendVllm, before: Callable[..., VllmEngine]) -> None:
    before(vllm).generate(GenerationRequest(prompt="ab", labels=("x", "yz")))
    assert len(vllm.bodies[-1]["prompt"]) == 2
