"""The official client against the server: its own calls, and every answer with its receipt."""

from collections import Counter
from typing import Any

import openai
import pytest

from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

PROMPT = "select the name of"


@pytest.mark.parametrize("model", ["base", "sql", "sql:1", "sql@prod", "event", "sql:1*0.5+event*2"])
def test_a_completion_is_the_engines_answer_with_its_receipt(
    client: openai.OpenAI, shared_engine: InferenceEngine, model: str
) -> None:
    raw = client.completions.with_raw_response.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    answer = raw.parse()
    adapter = None if model == "base" else model
    alone = shared_engine.generate(GenerationRequest(prompt=PROMPT, adapter=adapter, max_new_tokens=12))
    assert answer.choices[0].text == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage.completion_tokens == alone.usage.completion_tokens
    receipt = {
        "adapter": alone.adapter,
        "adapter_digest": alone.adapter_digest,
        "base_fingerprint": alone.base_fingerprint,
    }
    assert answer.receipt == receipt  # type: ignore[attr-defined]
    assert raw.headers["x-adapterhub-adapter"] == (alone.adapter or "base")
    assert raw.headers["x-adapterhub-digest"] == (alone.adapter_digest or "none")
    assert raw.headers["x-adapterhub-base"] == alone.base_fingerprint


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
    options: Any = {"model": "sql@prod", "messages": messages, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage is not None and whole.usage is not None
    # What the first request computed of the prompt, the second takes over.
    pieces[-1].usage.prompt_tokens_details = whole.usage.prompt_tokens_details
    assert pieces[-1].usage == whole.usage
    assert {str(piece.receipt) for piece in pieces} == {str(whole.receipt)}  # type: ignore[attr-defined]


def test_streamed_completions_and_lists_of_prompts(client: openai.OpenAI) -> None:
    options: Any = {"model": "event", "max_tokens": 10, "temperature": 0}
    both = client.completions.create(prompt=["one", "two"], **options)
    assert [choice.index for choice in both.choices] == [0, 1]
    texts = Counter[int]()
    streamed = {0: "", 1: ""}
    for piece in client.completions.create(prompt=["one", "two"], stream=True, **options):
        (choice,) = piece.choices
        streamed[choice.index] += choice.text
        texts[choice.index] += choice.finish_reason is not None
    assert streamed == {choice.index: choice.text for choice in both.choices} and texts == {0: 1, 1: 1}


def test_stop_strings_end_an_answer_before_them(client: openai.OpenAI) -> None:
    options: Any = {"model": "sql:2", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[5:7]
    stopped = client.completions.create(**options, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_logprobs_in_both_forms(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="sql", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    told = completion.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.token_logprobs is not None
    assert len(told.tokens) == completion.usage.completion_tokens == len(told.token_logprobs)
    assert all(value is not None and value <= 0 for value in told.token_logprobs)
    chat = client.chat.completions.create(
        model="sql",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert all(len(item.top_logprobs) == 3 for item in content)
    assert all(item.logprob == item.top_logprobs[0].logprob for item in content)


def test_bytes_of_tokens_are_those_of_the_text_also_where_a_character_has_several(client: openai.OpenAI) -> None:
    """A client joins them to get a character that several tokens make; pieces were told as the bytes of "\N{REPLACEMENT CHARACTER}"."""
    form = {"guided_choice": ["é☃", "☃é"]}
    chat = client.chat.completions.create(
        model="sql", messages=[{"role": "user", "content": "x"}], max_tokens=9, logprobs=True, extra_body=form
    )
    content = chat.choices[0].logprobs.content
    assert len(content) >= 5 and any(item.token == "\N{REPLACEMENT CHARACTER}" for item in content)
    assert b"".join(bytes(item.bytes) for item in content[:5]).decode() == chat.choices[0].message.content


def test_a_seed_repeats_and_sampling_is_on_by_default(client: openai.OpenAI) -> None:
    options: Any = {"model": "sql", "prompt": PROMPT, "max_tokens": 16}
    texts = {client.completions.create(**options, seed=7).choices[0].text for _ in range(2)}
    assert len(texts) == 1
    assert client.completions.create(**options, seed=8).choices[0].text not in texts


def test_models_are_the_base_the_versions_and_the_aliases(client: openai.OpenAI, registry: AdapterRegistry) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == ["base", "event:1", "sql:1", "sql:2", "event", "sql", "sql@prod"]
    assert client.models.retrieve("sql").receipt["adapter_digest"] == registry.resolve("sql:2").digest  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "nothing"),
        ({"model": "sql:9"}, openai.NotFoundError, "sql"),
        ({"model": "../../etc"}, openai.BadRequestError, "Wanted an adapter"),
        ({"model": "/tmp"}, openai.BadRequestError, "Wanted an adapter"),
        ({"model": "sql*x"}, openai.BadRequestError, "finite weight"),
        ({"model": "+".join(["sql"] * 9)}, openai.BadRequestError, "at most 8 parts"),
        ({"max_tokens": 5000}, openai.BadRequestError, "the limit is 1024"),
        ({"prompt": "x" * 300_000}, openai.BadRequestError, "characters"),
        ({"prompt": "x" * 1000}, openai.BadRequestError, "tokens, this base takes"),
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"n": 0}, openai.BadRequestError, "n is 0, wanted at least 1"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"adapter_path": "/tmp"}}, openai.BadRequestError, "adapter_path"),
    ],
)
def test_what_cannot_be_is_an_error_in_openais_form(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        client.completions.create(**{"model": "sql", "prompt": "x", "max_tokens": 2, **options})
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
