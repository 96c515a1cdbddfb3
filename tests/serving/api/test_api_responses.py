"""/v1/responses with the official client: the same answers as chat, events in OpenAI's order, calls and forms."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from adapterhub_lite.serving.api.auth import KeyFile, KeyRing
from adapterhub_lite.serving.api.server import ApiServer
from tests.serving.api.test_api_tools import SCHEMA

Serve = Callable[..., tuple[ApiServer, openai.OpenAI]]
KEYS = KeyRing(KeyFile(keys={"sk-sql": ("sql",)}, admin="sk-admin"))
ASK: Any = [{"role": "user", "content": "How many?"}]
TOOL: Any = {"type": "function", "name": "count_rows", "parameters": SCHEMA, "strict": True}


def test_a_response_is_the_answer_of_the_chat(roomy: openai.OpenAI) -> None:
    options: Any = {"model": "sql", "temperature": 0}
    chat = roomy.chat.completions.create(
        **options, messages=[{"role": "system", "content": "Be brief."}, *ASK], max_tokens=16
    )
    told = roomy.responses.create(**options, input="How many?", instructions="Be brief.", max_output_tokens=16)
    assert told.output_text == chat.choices[0].message.content
    assert (told.usage.input_tokens, told.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    assert told.receipt == chat.receipt  # type: ignore[attr-defined]
    status = {"length": "incomplete", "stop": "completed"}[chat.choices[0].finish_reason]
    assert told.status == status
    again = roomy.responses.create(
        **options, input=[*ASK, *(item.to_dict() for item in told.output), *ASK], max_output_tokens=4
    )
    assert again.output_text


@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_events_come_in_openais_order(roomy: openai.OpenAI, tools: Any) -> None:
    options: Any = {"model": "sql", "input": "How many?", "temperature": 0, "max_output_tokens": 200}
    options |= {"tools": list(tools), "tool_choice": "required", "parallel_tool_calls": False} if tools else {}
    whole = roomy.responses.create(**options)
    events = list(roomy.responses.create(**options, stream=True))
    kind = "function_call_arguments" if tools else "output_text"
    part = [] if tools else ["response.content_part.added"]
    first = ["response.created", "response.in_progress", "response.output_item.added", *part, f"response.{kind}.delta"]
    assert [event.type for event in events[: len(first)]] == first
    last = [f"response.{kind}.done", *(["response.content_part.done"] if part else []), "response.output_item.done"]
    assert [event.type for event in events[-len(last) - 1 : -1]] == last
    assert events[-1].type == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == f"response.{kind}.delta")
    final = events[-1].response.output[0]
    assert text == (final.arguments if tools else final.content[0].text)
    assert text == (whole.output[0].arguments if tools else whole.output_text)
    if tools:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_a_form_is_kept(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "row", "schema": SCHEMA, "strict": True}}
    told = client.responses.create(model="event", input="x", text=form, max_output_tokens=300)
    jsonschema.validate(json.loads(told.output_text), SCHEMA)


@pytest.mark.parametrize(
    "options",
    [{"previous_response_id": "resp_1"}, {"store": True}, {"tools": [{"type": "web_search"}]}, {"background": True},
     {"text": {"format": {"type": "json_schema", "name": "x"}}}, {"input": []}, {"reasoning": {"effort": "low"}}],
)  # fmt: skip
def test_what_is_not_done_is_refused(client: openai.OpenAI, options: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "sql", "input": "x", **options})
    assert caught.value.param is not None


def test_the_doors_of_other_servers(serve: Serve) -> None:
    server, client = serve("sk-sql", keys=KEYS)

    def ask(method: str, path: str, key: str = "sk-sql", **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.request(method, f"{server.url}{path}", json=body or None, headers=headers)

    chat: Any = {"messages": ASK, "max_tokens": 2, "temperature": 0}
    for model, body in (("base:sql@prod", {}), ("base", {"adapter_id": "sql@prod"}), ("sql@prod", {})):
        assert client.chat.completions.create(model=model, **chat, extra_body=body).receipt["adapter"] == "sql:1"
    for model, body in (("base:event", {}), ("base", {"adapter_id": "event"})):
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model=model, **chat, extra_body=body)
    with pytest.raises(openai.BadRequestError, match="two adapters"):
        client.chat.completions.create(model="sql:1", **chat, extra_body={"adapter_id": "sql:2"})
    with pytest.raises(openai.PermissionDeniedError):
        client.responses.create(model="event", input="x")
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert ask("POST", path, model="event", **body).status_code == 403
        assert ask("POST", path, "sk-wrong", model="sql", **body).status_code == 401
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert ask("POST", load, lora_name="sql", lora_path="sql").status_code == 403
    assert ask("POST", load, "sk-admin", lora_name="sql@prod", lora_path="sql:1").status_code == 200
    assert ask("POST", load, "sk-admin", lora_name="sql", lora_path="sql:1").status_code == 400
    for path in ("/tmp", "../x", "file:///etc"):
        assert ask("POST", load, "sk-admin", lora_name="sql", lora_path=path).status_code == 400
    assert ask("POST", load, "sk-admin", lora_name="nothing", lora_path="sql").status_code == 404
    assert ask("POST", unload, "sk-admin", lora_name="sql:1").status_code == 200
    assert ask("POST", unload, "sk-admin", lora_name="sql:1").status_code == 404
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"base", "sql", "sql:1", "sql:2", "sql@prod"}
    assert listed["sql"].root == "sql:2" and listed["sql"].parent == "base" and listed["sql"].created > 1_700_000_000  # type: ignore[attr-defined]
    for path in ("/health", "/v1/models", "/version"):
        got = ask("HEAD", path)
        assert (got.status_code, got.content) == (200, b"")
    assert ask("HEAD", "/v1/chat/completions").status_code == 405
