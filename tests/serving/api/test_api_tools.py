"""Tools over HTTP with the official client: calls that are forced are always valid, streamed or whole, by every model."""

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from adapterhub_lite.serving.api.server import ApiServer

ASK: Any = [{"role": "user", "content": "How many?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "table": {"enum": ["users", "orders"]},
        "limit": {"type": "integer", "minimum": 0, "maximum": 99},
        "where": {"type": "string", "maxLength": 6},
    },
    "required": ["table", "limit"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "count_rows", "description": "Count.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop-it"}},
]
# Templates without tools, and those of three families.
MODELS = ("base", "sql", "sql*0.5+event*2", "hermes", "coder", "nested")


def valid(call: Any) -> None:
    schema = SCHEMA if call.function.name == "count_rows" else {"type": "object"}
    jsonschema.validate(json.loads(call.function.arguments), schema)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count_rows"}}])
def test_a_call_that_is_asked_for_is_made_and_valid(roomy: openai.OpenAI, model: str, choice: Any) -> None:
    for seed in range(3):
        answer = roomy.chat.completions.create(
            model=model, messages=ASK, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=400,
            parallel_tool_calls=False,
        )  # fmt: skip
        message, calls = answer.choices[0].message, answer.choices[0].message.tool_calls or []
        assert (answer.choices[0].finish_reason, message.content, len(calls)) == ("tool_calls", None, 1)
        assert choice == "required" or calls[0].function.name == "count_rows"
        valid(calls[0])


def test_streamed_pieces_make_the_same_call(roomy: openai.OpenAI) -> None:
    options: Any = {"model": "sql", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "seed": 2,
                    "max_tokens": 400, "parallel_tool_calls": False}  # fmt: skip
    whole = roomy.chat.completions.create(**options).choices[0].message.tool_calls or []
    assert whole
    for one in whole:
        valid(one)
    made: dict[int, list[str]] = {}
    pieces = list(roomy.chat.completions.create(**options, stream=True))
    for piece in pieces:
        for call in piece.choices[0].delta.tool_calls or []:
            if call.id:
                made[call.index] = [call.function.name, ""]
            made[call.index][1] += call.function.arguments
    assert made == {index: [one.function.name, one.function.arguments] for index, one in enumerate(whole)}
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    assert len(pieces) > 10, "the arguments come in pieces"


def test_tools_that_need_not_be_called_leave_the_text(roomy: openai.OpenAI) -> None:
    options: Any = {"model": "sql", "messages": ASK, "max_tokens": 24, "temperature": 0}
    for choice in ("none", "auto"):
        message = roomy.chat.completions.create(**options, tools=TOOLS, tool_choice=choice).choices[0].message
        assert message.content and not message.tool_calls
    # Strict tools are free to be called or not, and valid if they are.
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    answer = roomy.chat.completions.create(**options, tools=strict).choices[0]
    assert answer.message.content or answer.message.tool_calls


def test_a_schema_for_the_text_goes_with_tools(roomy: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "row", "schema": SCHEMA, "strict": True}}
    for seed in range(4):
        answer = roomy.chat.completions.create(
            model="event",
            messages=ASK,
            tools=TOOLS,
            response_format=form,
            seed=seed,
            max_tokens=400,
            parallel_tool_calls=False,
        )  # type: ignore[call-overload]
        for call in answer.choices[0].message.tool_calls or []:
            valid(call)
        if not answer.choices[0].message.tool_calls:
            jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_a_conversation_with_calls_goes_on(roomy: openai.OpenAI) -> None:
    options: Any = {"model": "hermes", "max_tokens": 300, "temperature": 0}
    first = roomy.chat.completions.create(**options, messages=ASK, tools=TOOLS, tool_choice="required")
    message = first.choices[0].message
    turns: Any = [*ASK, message]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "3"} for call in message.tool_calls or []]
    for tools in ({"tools": TOOLS}, {}):
        again = roomy.chat.completions.create(**{**options, "max_tokens": 8}, messages=turns, **tools)
        assert again.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="no message before it made"):
        roomy.chat.completions.create(**options, messages=[*ASK, turns[-1]])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tool_choice": "required"}, "is for tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "not among the tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]}, "object"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"b": {"type": 3}}}}}],
             "tool_choice": "required"},
            "cannot be",
        ),
        ({"tools": TOOLS, "extra_body": {"guided_regex": "a+"}}, "schema"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}, "assistant"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1"}}]}]}, "not a JSON object"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told(roomy: openai.OpenAI, options: dict[str, Any], text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text):
        roomy.chat.completions.create(**{"model": "sql", "messages": ASK, "max_tokens": 4, **options})


def test_tokens_are_those_that_the_model_is_asked_with(roomy_server: ApiServer, roomy: openai.OpenAI) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{roomy_server.url}{path}", json=body, timeout=60)

    told = post("/tokenize", model="sql", prompt="How many?", return_token_strs=True).json()
    assert (told["count"], len(told["token_strs"])) == (len(told["tokens"]),) * 2
    assert post("/detokenize", model="sql", tokens=told["tokens"]).json() == {"prompt": "How many?"}
    for tools in ({}, {"tools": TOOLS}):
        told = post("/tokenize", model="sql", messages=ASK, **tools).json()
        answer = roomy.chat.completions.create(model="sql", messages=ASK, max_tokens=1, **tools)
        assert told["count"] == answer.usage.prompt_tokens
        assert told["max_model_len"] == 8192
    assert post("/detokenize", model="sql", tokens=[10**9]).status_code == 400
    assert post("/tokenize", model="sql").status_code == 400
    assert httpx.get(f"{roomy_server.url}/version").json()["version"]
