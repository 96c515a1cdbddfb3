"""Answers of a given form over HTTP, as OpenAI's and vLLM's clients ask for them."""

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from adapterhub_lite.serving.api.server import ApiServer

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
ASKED: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}}, "n"),
    ({"structured_outputs": {"json": SCHEMA}}, "n"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "n"),
    ({"guided_json": SCHEMA}, "n"),
    ({"structured_outputs": {"choice": ["ab", "cd"]}}, ("ab", "cd")),
    ({"guided_choice": ["ab", "cd"]}, ("ab", "cd")),
    ({"structured_outputs": {"regex": "[xy]z"}}, ("xz", "yz")),
    ({"guided_regex": "[xy]z"}, ("xz", "yz")),
    ({"structured_outputs": {"grammar": 'root ::= "p" | "q"'}}, ("p", "q")),
    ({"guided_grammar": 'start: "p" | "q"'}, ("p", "q")),
]


@pytest.mark.parametrize(("more", "expected"), ASKED)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_has_the_form_that_was_asked_for(
    shared_server: ApiServer, path: str, more: dict[str, Any], expected: Any, stream: bool
) -> None:
    body: dict[str, Any] = {"model": "sql", "max_tokens": 100, "stream": stream, "seed": 1, **more}
    body |= {"messages": [{"role": "user", "content": "a"}]} if path.startswith("chat") else {"prompt": "a"}
    got = httpx.post(f"{shared_server.url}/v1/{path}", json=body)
    assert got.status_code == 200, got.text
    lines = [line.removeprefix("data: ") for line in got.text.splitlines() if line and "[DONE]" not in line]
    choices = [json.loads(line)["choices"][0] for line in (lines if stream else [got.text])]
    assert choices[-1]["finish_reason"] == "stop"
    parts = [
        choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") for choice in choices
    ]
    text = "".join(part or "" for part in parts)
    assert (0 <= json.loads(text)["n"] <= 9) if expected == "n" else text in expected


def test_openais_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        initial: str = pydantic.Field(max_length=1)
        old: bool

    answer = client.chat.completions.parse(
        model="sql", messages=[{"role": "user", "content": "who?"}], response_format=Person, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"guided_regex": "("}, "regex cannot be"),
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_json": "[1"}, "not JSON"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "more than once"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
    ],
)
def test_a_form_that_cannot_be_is_a_400(shared_server: ApiServer, more: dict[str, Any], text: str) -> None:
    body = {"model": "sql", "prompt": "a", "max_tokens": 4, **more}
    got = httpx.post(f"{shared_server.url}/v1/completions", json=body)
    assert (got.status_code, text in got.text) == (400, True), got.text
