"""Beginnings that another request has computed are taken over: answers stay what they are alone, and never cross."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.errors import RequestCancelledError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.engine.reuse.prefixes import shared
from tests.step_gate import StepGate

SYSTEM = "You answer in one word, and never in more than that, whatever it is that is asked. "
QUESTIONS = ("Is it day?", "Is it night? Look outside.", "Who asks?", "And now?")


def test_the_common_beginning() -> None:
    for one, other, length in (([], [1], 0), ([1], [1], 1), ([1, 2, 3], [1, 2, 4], 2), ([5, 6], [6], 0)):
        assert shared(one, other) == length
    long = list(range(300))
    assert [shared(long, [*long[:at], -1, *long[at:]]) for at in range(300)] == list(range(300))


def test_a_conversation_reads_only_what_is_new(engine: InferenceEngine, alone: Any, byte_tokenizer: Any) -> None:
    said, before = SYSTEM, 0
    for question in QUESTIONS:
        said += question
        answer = engine.generate(GenerationRequest(said, max_new_tokens=12))
        assert answer.token_ids == alone.tokens(said)
        assert answer.usage.cached_tokens >= before
        before = len(byte_tokenizer.encode(said))
        assert answer.usage.prompt_tokens == before
    # A word that was said before, word for word: all but the last token are there.
    again = engine.generate(GenerationRequest(said, max_new_tokens=12))
    assert (again.token_ids, again.usage.cached_tokens) == (alone.tokens(said), before - 1)


def test_questions_that_come_at_once_read_their_beginning_once_per_adapter(
    engine: InferenceEngine, alone: Any, adapters: dict[str, Path], byte_tokenizer: Any
) -> None:
    asked = [(adapters[name], question) for question in QUESTIONS for name in ("small", "wide")]
    answers = engine.generate_many(
        [GenerationRequest(SYSTEM + question, adapter=adapter, max_new_tokens=12) for adapter, question in asked]
    )
    for (adapter, question), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == alone.tokens(SYSTEM + question, adapter)
    length = len(byte_tokenizer.encode(SYSTEM))
    assert [answer.usage.cached_tokens >= length for answer in answers] == [False, False] + [True] * 6
    assert answers[0].usage.cached_tokens == answers[1].usage.cached_tokens == 0


def test_nothing_crosses_adapters_tenants_or_loads(
    engine: InferenceEngine, alone: Any, adapters: dict[str, Path]
) -> None:
    def cached(adapter: Path | None, **options: Any) -> int:
        answer = engine.generate(GenerationRequest(SYSTEM, adapter=adapter, max_new_tokens=12, **options))
        assert answer.token_ids == alone.tokens(SYSTEM, *([adapter] if adapter else []))
        return answer.usage.cached_tokens

    assert cached(adapters["small"]) == 0
    assert cached(adapters["wide"]) == 0
    assert cached(None) == 0
    assert cached(adapters["small"], tenant="another") == 0
    assert min(cached(adapters["small"]), cached(adapters["wide"]), cached(None)) > 0
    engine.unload(adapters["small"])
    assert cached(adapters["small"]) == 0


def test_who_waits_for_a_request_that_is_cancelled_reads_on_by_itself(
    make_engine: Callable[..., InferenceEngine], alone: Any
) -> None:
    engine = make_engine(max_rows=4)
    gate = StepGate(engine)
    prompts = [SYSTEM * 4 + question for question in QUESTIONS]
    handles = [engine.submit(GenerationRequest(prompt, max_new_tokens=12)) for prompt in prompts[:1]]
    assert gate.begun.acquire(timeout=300)
    handles += [engine.submit(GenerationRequest(prompt, max_new_tokens=12)) for prompt in prompts[1:]]
    gate.allow(1)
    assert gate.begun.acquire(timeout=300)
    first, *others = [handle._sequence for handle in handles]
    read, leaders = first.computed, {one.leader for one in others}
    handles[0].cancel()
    gate.allow(10_000)
    # It was cancelled while the others waited for a beginning that it had read half of.
    assert 0 < read < 4 * len(SYSTEM) and leaders == {first}
    with pytest.raises(RequestCancelledError):
        handles[0].result()
    for prompt, handle in zip(prompts[1:], handles[1:], strict=True):
        assert handle.result().token_ids == alone.tokens(prompt)


def test_rows_that_come_and_go_answer_as_alone(
    make_engine: Callable[..., InferenceEngine], alone: Any, adapters: dict[str, Path]
) -> None:
    """Few rows and many requests: rows are moved, contents make way, and whatever is taken over is the right one."""
    dice = random.Random(7)
    engine = make_engine(max_rows=3)
    beginnings = [SYSTEM, SYSTEM[:40], SYSTEM + "Listen. ", "Quite another beginning, which is about as long. "]
    asked = []
    for number in range(36):
        adapter = dice.choice([None, adapters["small"], adapters["wide"]])
        prompt = dice.choice(beginnings) + dice.choice(QUESTIONS)[: dice.randint(1, 12)]
        handle = engine.submit(GenerationRequest(prompt, adapter=adapter, max_new_tokens=12))
        if number % 9 == 8:
            handle.cancel()
        else:
            asked.append((prompt, adapter, handle))
        if number % 6 == 5:
            asked[-1][2].result()
    cached = 0
    for prompt, adapter, handle in asked:
        answer = handle.result()
        assert answer.token_ids == alone.tokens(prompt, *([adapter] if adapter else [])), prompt
        cached += answer.usage.cached_tokens
    assert cached > 400
