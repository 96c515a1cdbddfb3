"""Guessed tokens: answers are the same with and without, greedy and sampled, with forms, stops and adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.native import find_compiler
from adapterhub_lite.serving import GenerationRequest, GenerationResult, InferenceEngine
from adapterhub_lite.serving.adapters.weights import Part
from adapterhub_lite.serving.engine.reuse import guesses
from adapterhub_lite.serving.engine.reuse.guesses import MOST_TOKENS
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.proof import random_adapter

compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler on this machine")


def asked(adapters: dict[str, Path]) -> list[GenerationRequest]:
    common: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True}
    return [
        GenerationRequest(prompt="abcabcabcabc", **common),
        GenerationRequest(prompt="abcabcabcabc", adapter=adapters["small"], **common),
        GenerationRequest(prompt="the one, the other, the one", adapter=adapters["wide"], logprobs=2, **common),
        GenerationRequest(prompt="one two one two", temperature=0.7, seed=5, **common),
        GenerationRequest(prompt="xyxyxy", temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=6, **common),
        GenerationRequest(prompt="abab", max_new_tokens=1),
        GenerationRequest(prompt="abab", max_new_tokens=2, ignore_eos=True),
    ]


def essence(result: GenerationResult) -> tuple[Any, ...]:
    return result.token_ids, result.text, result.finish_reason, result.usage.completion_tokens


@compiler
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same_with_and_without(
    together: int, dtype: str, make_engine: Callable[..., InferenceEngine], adapters: dict[str, Path]
) -> None:
    answers = []
    for guess in (True, False):
        engine = make_engine(guess=guess, dtype=dtype)
        requests = asked(adapters) * 2  # the second time there are earlier answers
        found: list[GenerationResult] = []
        for first in range(0, len(requests), together):
            found += engine.generate_many(requests[first : first + together])
        status = engine.status()
        assert (status.guessed_right > 20 and status.guessed >= status.guessed_right) == guess
        assert guess or status.guessed == 0
        answers.append(found)
        steps = status.steps
    for one, other in zip(*answers, strict=True):
        assert essence(one) == essence(other)
        if one.logprobs is not None:
            assert one.logprobs == other.logprobs
    assert steps > 0


@compiler
def test_fewer_steps_are_computed(make_engine: Callable[..., InferenceEngine]) -> None:
    request = GenerationRequest(prompt="abcabcabcabc", max_new_tokens=80, ignore_eos=True)
    steps = []
    for guess in (True, False):
        engine = make_engine(guess=guess)
        for _ in range(2):
            before = engine.status().steps
            engine.generate(request)
        steps.append(engine.status().steps - before)
    assert steps[0] < 0.5 * steps[1], "an answer that was given before is guessed"


@compiler
def test_a_form_that_leaves_no_choice_is_guessed(make_engine: Callable[..., InferenceEngine]) -> None:
    request = GenerationRequest(
        prompt="x", regex="one(ly|and) long way to say (yes|no), as it were", max_new_tokens=120
    )
    engines = [make_engine(guess=guess) for guess in (True, False)]
    found = [engine.generate(request) for engine in engines]
    assert essence(found[0]) == essence(found[1])
    assert found[0].finish_reason == "stop"
    status = engines[0].status()
    assert status.guessed_right > 10
    assert status.steps < 0.7 * engines[1].status().steps


@compiler
def test_a_tenants_answers_are_not_looked_up_for_another(make_engine: Callable[..., InferenceEngine]) -> None:
    engine = make_engine()
    common: dict[str, Any] = {"prompt": "qwertz", "max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    engine.generate(GenerationRequest(**common, seed=1, tenant="one"))
    earlier = engine._core._guesses._earlier
    assert [key[0] for key in earlier] == ["one"]
    engine.generate(GenerationRequest(**common, seed=1, tenant="two"))
    assert sorted(key[0] for key in earlier) == ["one", "two"]


@compiler
def test_what_is_kept_of_earlier_answers_has_a_bound(
    make_engine: Callable[..., InferenceEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guesses, "KEPT_OF_ALL", 400)
    engine = make_engine()
    common: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    for at in range(12):
        engine.generate(GenerationRequest(prompt=f"question {at}", seed=at, tenant=str(at), **common))
    earlier = engine._core._guesses._earlier
    assert sum(map(len, earlier.values())) <= 400 and list(earlier)[-1][0] == "11"


@compiler
@torch.inference_mode()
def test_logits_do_not_depend_on_how_many_tokens_are_computed_at_once(
    make_engine: Callable[..., InferenceEngine],
) -> None:
    """Bit for bit: guesses, and neighbours, change nothing."""
    runner = make_engine(dtype="bfloat16")._runner
    part = Part(random_adapter(runner.families, runner.model, torch.Generator().manual_seed(3)))
    ids = torch.randint(200, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for row, parts in enumerate([(part,), (), (part,)]):
        runner.admit(row, parts, 64)
        runner.forward(pack([RowSlice(row, 0, ids[:20])]))
    single = [
        runner.forward(pack([RowSlice(row, 20 + at, [ids[20 + at]]) for row in range(3)])) for at in range(MOST_TOKENS)
    ]
    for row in range(3):
        for count in range(1, MOST_TOKENS + 1):
            together = runner.forward(pack([RowSlice(row, 20, ids[20 : 20 + count], count)]))
            for at in range(count):
                assert torch.equal(together[at], single[at][row]), (row, count, at)
