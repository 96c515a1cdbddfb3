"""Tokens that are given: their log-probabilities are the model's own log-softmax, whatever shares the batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model, resolve_base
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.sources import FolderSource
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

LABELS = ["yes", "no", "nay", "yours", "entirely something else"]


def label_logprob(alone: Any, ids: list[int], label: list[int], *parts: Any) -> float:
    total = 0.0
    for at, token in enumerate(label):
        total += float(alone.logits([*ids, *label[:at]], *parts).log_softmax(-1)[token])
    return total


@pytest.fixture(params=list(ForwardKind))
def engine_of_each_kind(
    request: pytest.FixtureRequest, tiny_base: Path, byte_tokenizer: Any
) -> Iterator[InferenceEngine]:
    base = resolve_base(tiny_base)
    runner = ModelRunner(load_base_model(tiny_base, dtype=torch.float32, device="cpu"), rows=8, kind=request.param)
    with InferenceEngine(runner, byte_tokenizer, base.fingerprint, source=FolderSource(base)) as engine:
        yield engine


def test_prompts_and_labels_have_the_models_log_probabilities(
    engine_of_each_kind: InferenceEngine, alone: Any, byte_tokenizer: Any, adapters: dict[str, Path]
) -> None:
    engine = engine_of_each_kind
    prompts = ["a", "some prompt that is longer than the others, and read in several pieces " * 4]
    for adapter in (None, adapters["wide"]):
        parts = (adapter,) if adapter else ()
        asked = [GenerationRequest(prompt=p, adapter=adapter, prompt_logprobs=2, max_new_tokens=3) for p in prompts]
        scored = [GenerationRequest(prompt=p, adapter=adapter, labels=LABELS) for p in prompts]
        free = GenerationRequest(prompt="free", adapter=adapters["mlp"], max_new_tokens=30)
        *results, beside = engine.generate_many([*asked, *scored, free])
        assert beside.token_ids == alone.tokens("free", adapters["mlp"], new=30)
        for prompt, echoed, label_result in zip(prompts, results[:2], results[2:], strict=True):
            ids = byte_tokenizer.encode(prompt)
            assert echoed.token_ids == alone.tokens(prompt, *parts, new=3)
            assert echoed.prompt_logprobs[0].logprob is None and len(echoed.prompt_logprobs) == len(ids)
            model = alone.model(*((part, 1.0) for part in parts))
            truth = model(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
            for at, noted in enumerate(echoed.prompt_logprobs[1:]):
                assert noted.token_id == ids[at + 1]
                assert noted.logprob == pytest.approx(float(truth[at, ids[at + 1]]), abs=1e-4)
                assert [token for token, _ in noted.top] == truth[at].topk(2).indices.tolist()
            expected = [label_logprob(alone, ids, byte_tokenizer.encode(label), *parts) for label in LABELS]
            assert label_result.label_logprobs == pytest.approx(expected, abs=1e-3)
            assert (label_result.text, label_result.usage.completion_tokens) == ("", 0)


def test_choices_have_a_distribution(engine: InferenceEngine, adapters: dict[str, Path]) -> None:
    found = engine.score("which?", LABELS, adapter=adapters["small"])
    assert list(found) == LABELS and sum(found.values()) == pytest.approx(1.0)
    chat = engine.score([{"role": "user", "content": "which?"}], ["a", "b"])
    assert set(chat) == {"a", "b"}
    for labels, reason in (
        (["x" * 600], "left after the prompt"),
        (["no", "nothing"], "beginning"),
        (["a", "a"], "the same"),
        ([], "choices"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            engine.score("x", labels)


def test_tokens_as_a_prompt_are_taken_as_they_are(engine: InferenceEngine, byte_tokenizer: Any) -> None:
    ids = byte_tokenizer.encode("tokens")
    whole, by_ids = (
        engine.generate(GenerationRequest(max_new_tokens=6, **source))
        for source in ({"prompt": "tokens"}, {"prompt_token_ids": ids})
    )
    assert whole.token_ids == by_ids.token_ids
    cut, short = (
        engine.generate(GenerationRequest(max_new_tokens=6, **source))
        for source in ({"prompt": "tokens", "truncate_prompt_tokens": 3}, {"prompt": "ens"})
    )
    assert cut.token_ids == short.token_ids and cut.usage.prompt_tokens == 3
    with pytest.raises(ConfigurationError, match="prompt_token_ids has 9999"):
        engine.generate(GenerationRequest(prompt_token_ids=[1, 9999]))


def test_the_answer_goes_on_with_the_last_message(engine: InferenceEngine, alone: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hel"}]
    result = engine.generate(GenerationRequest(messages=messages, continue_final_message=True, max_new_tokens=8))
    assert result.token_ids == alone.tokens("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhel", new=8)
