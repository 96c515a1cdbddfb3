"""Sampling: every extreme, the share each token gets, and that the batch around a request changes nothing."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.engine.sampling import Sampler, token_logprob

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(
    count: int = 2000, logits: torch.Tensor = LOGITS, prompt: tuple[int, ...] = (), **options: Any
) -> Counter[int]:
    sampler = Sampler(GenerationRequest(prompt="x", seed=3, **{"temperature": 1.0, **options}), prompt)
    return Counter(sampler.choose(logits) for _ in range(count))


def test_tokens_come_as_often_as_their_probability() -> None:
    found = draws(4000)
    for token, share in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(found[token] / 4000 - share) < 0.03


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.8}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 10_000}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
        ({"temperature": 1e-6}, {0}),
        ({"temperature": 0.0}, {0}),
        ({"temperature": 100.0}, {0, 1, 2, 3}),
    ],
)
def test_extremes_keep_exactly_the_tokens_they_should(options: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(**options)) == kept


def test_logits_far_apart_and_minus_infinity() -> None:
    far = torch.tensor([1e30, -1e30, -torch.inf, 0.0])
    assert set(draws(50, far)) == {0}
    assert set(draws(50, far, temperature=100.0, top_p=0.9)) == {0}


def expected(logits: torch.Tensor, ids: list[int], options: dict[str, Any]) -> torch.Tensor:
    """The probabilities (vocabulary,) after the tokens `ids`, by transformers' own processors."""
    scores, known = logits[None].clone(), torch.tensor([ids])
    if "logit_bias" in options:
        bias = {(token,): value for token, value in options["logit_bias"].items()}
        scores = SequenceBiasLogitsProcessor(bias)(known, scores)
    if "repetition_penalty" in options:
        scores = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(known, scores)
    scores = TemperatureLogitsWarper(options.get("temperature", 1.0))(known, scores)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(known, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(known, scores)
    if "min_p" in options:
        scores = MinPLogitsWarper(options["min_p"])(known, scores)
    return scores[0].softmax(-1)


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.3, 3.0),
            "top_k": st.integers(1, 12),
            "top_p": st.floats(0.2, 1.0),
            "min_p": st.floats(0.01, 0.9),
            "repetition_penalty": st.floats(0.5, 2.0),
            "logit_bias": st.dictionaries(st.integers(0, 11), st.floats(-5.0, 5.0), min_size=1, max_size=4),
        },
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_are_those_of_transformers_processors(options: dict[str, Any], seed: int) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    ids = [1, 5, 5, 7]
    truth = expected(logits, ids, options)
    request = GenerationRequest(prompt="x", **{"temperature": 1.0, **options})
    sampler = Sampler(request, ids)
    torch.testing.assert_close(sampler.probabilities(sampler.scores(logits)).float(), truth, atol=1e-5, rtol=1e-4)


def test_penalties_weigh_what_was_written_as_openai_says() -> None:
    sampler = Sampler(GenerationRequest(prompt="x", presence_penalty=0.5, frequency_penalty=0.25), [0, 0])
    far = torch.tensor([0.0, 9.0, 0.0])
    for _ in range(3):
        assert sampler.choose(far) == 1
    torch.testing.assert_close(sampler.scores(torch.zeros(3)), torch.tensor([0.0, -(0.5 + 3 * 0.25), 0.0]))


def test_nothing_but_what_is_allowed_and_no_end_too_early() -> None:
    allowed = Sampler(GenerationRequest(prompt="x", allowed_token_ids=[1, 3]), ())
    assert allowed.choose(torch.tensor([9.0, 1.0, 8.0, 0.0])) == 1
    early = Sampler(GenerationRequest(prompt="x", min_tokens=2), (), ends={0})
    assert [early.choose(torch.tensor([9.0, 1.0])) for _ in range(3)] == [1, 1, 0]
    with pytest.raises(ConfigurationError, match="no token is left"):
        allowed.choose(torch.zeros(4), torch.tensor([True, False, True, False]))


def test_repetition_penalty_weighs_prompt_and_output() -> None:
    assert set(draws(1, torch.tensor([2.0, 1.9, -1.0]), prompt=(0,), temperature=0.0, repetition_penalty=2.0)) == {1}
    sampler = Sampler(GenerationRequest(prompt="x", repetition_penalty=2.0), ())
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0]), "the logits belong to the engine"


def test_same_seed_same_answer_whatever_shares_the_batch(engine: InferenceEngine) -> None:
    request = GenerationRequest(prompt="seeded", temperature=1.0, seed=11, max_new_tokens=12, top_p=0.95, top_k=50)
    single = engine.generate(request)
    others = [GenerationRequest(prompt=f"other {i}", temperature=1.5, max_new_tokens=20) for i in range(6)]
    assert engine.generate_many([*others, request])[-1].token_ids == single.token_ids
    assert engine.generate(GenerationRequest(prompt="seeded", temperature=1.0, max_new_tokens=12)) is not None


def test_ends_as_they_are_asked_for(engine: InferenceEngine) -> None:
    def ask(**options: Any) -> Any:
        return engine.generate(
            GenerationRequest(prompt="ends", **{"max_new_tokens": 12, "ignore_eos": True, **options})
        )

    free = ask()
    assert len(free.token_ids) == 12 and free.finish_reason == "length"
    third = free.token_ids[2]
    first = free.token_ids.index(third)
    stopped = ask(stop_token_ids=[third])
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert len(ask(stop_token_ids=[third], min_tokens=8).token_ids) >= 8
    piece = free.text[:2]
    assert ask(stop=[piece]).text == "" and len(ask(stop=[piece], min_tokens=6).token_ids) >= 6
    nothing = ask(max_new_tokens=0)
    assert (nothing.text, nothing.token_ids, nothing.finish_reason) == ("", (), "length")
    with pytest.raises(ConfigurationError, match="stop_token_ids has 100000"):
        ask(stop_token_ids=[100_000])


def test_logprobs_are_the_models(engine: InferenceEngine, alone: Any, byte_tokenizer: Any) -> None:
    result = engine.generate(GenerationRequest(prompt="abc", max_new_tokens=3, logprobs=4))
    assert result.logprobs is not None and len(result.logprobs) == 3
    ids = byte_tokenizer.encode("abc")
    for noted, token in zip(result.logprobs, result.token_ids, strict=True):
        truth = torch.log_softmax(alone.logits(ids), -1)
        assert noted.token_id == token and noted.top[0][0] == token and len(noted.top) == 4
        assert noted.logprob == pytest.approx(float(truth[token]), abs=1e-4)
        ids = [*ids, token]
    assert token_logprob(LOGITS, 2, 0).top == ()


def test_what_is_out_of_range_is_refused_all_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        GenerationRequest(
            temperature=float("nan"), top_p=0, top_k=-1, max_new_tokens=-1, stop=("",), logprobs=99, seed=-1
        )
    for word in ("prompt", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "logprobs", "seed"):
        assert word in str(caught.value)
    with pytest.raises(ConfigurationError, match="exactly one"):
        GenerationRequest(prompt="a", messages=[{"role": "user", "content": "b"}])
