"""Scores and several answers over HTTP: what is streamed is what comes whole, and both are the engine's own."""

import json
from collections import defaultdict
from typing import Any

import httpx
import pytest

from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer

LONG = "a prompt that is longer than a step reads at once, of which every token has its log-probability. " * 4


def post(server: ApiServer, path: str, **body: Any) -> Any:
    got = httpx.post(f"{server.url}{path}", json={"model": "sql", **body}, timeout=60)
    assert got.status_code == 200, got.text
    if not body.get("stream"):
        return got.json()
    return [json.loads(line[6:]) for line in got.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_prompt_that_is_echoed_has_its_log_probabilities(
    shared_server: ApiServer, shared_engine: InferenceEngine, byte_tokenizer: Any, as_tokens: bool, max_tokens: int
) -> None:
    prompts = ["short", LONG]
    given = [byte_tokenizer.encode(one) for one in prompts] if as_tokens else prompts
    options = {"prompt": given, "max_tokens": max_tokens, "temperature": 0, "echo": True, "logprobs": 3}
    whole = post(shared_server, "/v1/completions", **options)
    for choice, prompt in zip(whole["choices"], prompts, strict=True):
        asked = GenerationRequest(
            prompt=prompt, adapter="sql", max_new_tokens=max_tokens, prompt_logprobs=3, logprobs=3
        )
        truth = shared_engine.generate(asked)
        assert choice["text"] == prompt + truth.text
        assert truth.prompt_logprobs is not None and truth.logprobs is not None
        expected = [*truth.prompt_logprobs, *truth.logprobs]
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx([one.logprob for one in expected[1:]], abs=1e-4)
        # The base has rows for tokens that its tokenizer has no text of.
        texts = [
            byte_tokenizer.decode([one.token_id]) if one.token_id < len(byte_tokenizer) else f"token_id:{one.token_id}"
            for one in expected
        ]
        assert told["tokens"] == texts
        # Bytes that are no character by themselves have the same text.
        assert all(1 <= len(top) <= 3 for top in told["top_logprobs"][1:])
        assert told["text_offset"][: len(prompt)] == list(range(len(prompt)))
    joined: dict[int, Any] = defaultdict(lambda: defaultdict(list))
    for piece in post(shared_server, "/v1/completions", **options, stream=True):
        (choice,) = piece["choices"]
        joined[choice["index"]]["text"].append(choice["text"])
        for key, values in (choice["logprobs"] or {}).items():
            joined[choice["index"]][key] += values
    for choice in whole["choices"]:
        got = joined[choice["index"]]
        assert "".join(got["text"]) == choice["text"]
        assert got["tokens"] == choice["logprobs"]["tokens"]
        assert got["text_offset"] == choice["logprobs"]["text_offset"]
        assert got["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_streamed_chat_has_the_log_probabilities_of_the_whole(shared_server: ApiServer) -> None:
    options = {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "temperature": 0, "logprobs": True,
        "top_logprobs": 20, "prompt_logprobs": 1,
    }  # fmt: skip
    whole = post(shared_server, "/v1/chat/completions", **options)
    pieces = post(shared_server, "/v1/chat/completions", **options, stream=True)
    told = [one for piece in pieces for one in (piece["choices"][0]["logprobs"] or {"content": []})["content"]]
    expected = whole["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in told] == [one["token"] for one in expected] and len(told) == 9
    assert all(len(one["top_logprobs"]) == 20 for one in told)
    assert whole["prompt_logprobs"][0] is None and len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]


def test_several_answers_are_those_of_their_seeds(shared_server: ApiServer) -> None:
    options = {"prompt": ["one", "two"], "max_tokens": 6, "temperature": 1.0}
    both = post(shared_server, "/v1/completions", **options, n=3, seed=7)
    assert [choice["index"] for choice in both["choices"]] == list(range(6))
    for add in range(3):
        alone = post(shared_server, "/v1/completions", **options, seed=7 + add)
        assert [c["text"] for c in alone["choices"]] == [both["choices"][at]["text"] for at in (add, 3 + add)]
    assert both["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"], "each prompt is counted once"
    best = post(shared_server, "/v1/completions", **options, best_of=3, seed=7)
    assert [c["text"] for c in best["choices"]] != [] and len(best["choices"]) == 2
    ranked = post(shared_server, "/v1/completions", **options, n=3, seed=7, logprobs=0)["choices"]
    for at, choice in enumerate(best["choices"]):
        group = ranked[3 * at : 3 * at + 3]
        values = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in group]
        assert choice["text"] == group[values.index(max(values))]["text"] and choice["logprobs"] is None
    chat = post(shared_server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], n=2, max_tokens=3)
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]


def test_a_stream_of_more_prompts_than_are_computed_at_once(shared_server: ApiServer) -> None:
    prompts = [f"prompt {index}" for index in range(70)]
    options = {"prompt": prompts, "max_tokens": 3, "temperature": 0}
    whole = post(shared_server, "/v1/completions", **options)
    stream_options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = post(shared_server, "/v1/completions", **options, stream=True, stream_options=stream_options)
    texts: dict[int, str] = defaultdict(str)
    for piece in pieces:
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
        assert piece["usage"]["prompt_tokens"] == len(prompts[piece["choices"][0]["index"]])
    assert [texts[index] for index in range(70)] == [choice["text"] for choice in whole["choices"]]
    assert last["usage"] == whole["usage"]


def test_choices_are_scored_in_one_request(shared_server: ApiServer, shared_engine: InferenceEngine) -> None:
    labels = ["yes", "no", "maybe"]
    for source, prompt in ({"prompt": "q"}, "q"), ({"messages": [{"role": "user", "content": "q"}]}, None):
        got = post(shared_server, "/v1/score", **source, choices=labels)
        truth = shared_engine.score(prompt or source["messages"], labels, adapter="sql")
        assert {one["text"]: one["probability"] for one in got["choices"]} == pytest.approx(truth, abs=1e-4)
        assert got["receipt"]["adapter"] == "sql:2" and got["usage"]["completion_tokens"] == 0
    refused = httpx.post(f"{shared_server.url}/v1/score", json={"model": "sql", "prompt": "q", "choices": ["a", "ab"]})
    assert refused.status_code == 400 and "beginning" in refused.text


def test_chat_without_a_limit_takes_what_is_left(shared_server: ApiServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "ignore_eos": True}
    usage = post(shared_server, "/v1/chat/completions", **body)["usage"]
    assert usage["total_tokens"] == 512


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": ["a"] * 300, "n": 128}, "at most 2048"),
        ({"prompt": ["a"] * 200, "max_tokens": 1000, "logprobs": 20}, "at most 2,000,000"),
        ({"prompt": ["a" * 1000] * 100, "echo": True, "logprobs": 20}, "at most 2,000,000"),
        ({"prompt": ["a" * 1000] * 100, "prompt_logprobs": 20, "stream": True}, "at most 2,000,000"),
    ],
)
def test_what_would_fill_the_memory_is_refused(shared_server: ApiServer, body: dict[str, Any], text: str) -> None:
    got = httpx.post(f"{shared_server.url}/v1/completions", json={"model": "sql", **body})
    assert got.status_code == 400 and text in got.text, got.text
