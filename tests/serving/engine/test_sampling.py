"""Sampling: every extreme, the share each token gets, and that the batch around a request changes nothing."""

from collections import Counter
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.engine.sequence import Sampler, token_logprob

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
            temperature=float("nan"), top_p=0, top_k=-1, max_new_tokens=0, stop=("",), logprobs=99, seed=-1
        )
    for word in ("prompt", "temperature", "top_p", "top_k", "max_new_tokens", "stop", "logprobs", "seed"):
        assert word in str(caught.value)
    with pytest.raises(ConfigurationError, match="exactly one"):
        GenerationRequest(prompt="a", messages=[{"role": "user", "content": "b"}])
