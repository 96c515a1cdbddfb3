"""Asks a server with the clients that people use, in an environment of their own: python ask_with_all.py URL MODEL FOLDER.

One line of JSON for each thing that is tried: the client, what was tried, and what came of it: "works", "refused" with the
server's reason, or "wrong". FOLDER holds the base's tokenizer and a task of lm_eval.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import openai
import pydantic

URL, MODEL, FOLDER = f"{sys.argv[1]}/v1", sys.argv[2], sys.argv[3]
ASK: Any = [{"role": "user", "content": "How many?"}]
SHORT: Any = {"max_tokens": 8, "temperature": 0}


class Row(pydantic.BaseModel):
    """A row, of these two fields alone: what a random model writes comes to an end."""

    model_config = pydantic.ConfigDict(extra="forbid")

    table: Literal["users", "orders"]
    limit: Annotated[int, pydantic.Field(ge=0, le=99)]


TOOL: Any = {"type": "function", "function": {"name": "row", "parameters": Row.model_json_schema()}}


def is_row(value: Any) -> bool:
    return isinstance(value if isinstance(value, Row) else Row.model_validate(value), Row)


def tell(client: str, tried: str, call: Callable[[], bool]) -> None:
    try:
        outcome, reason = ("works" if call() else "wrong"), ""
    except openai.APIStatusError as error:
        outcome = "refused" if error.status_code < 500 else "wrong"
        reason = error.body["message"] if isinstance(error.body, dict) else error.message
    except Exception as error:
        outcome, reason = "wrong", f"{type(error).__name__}: {error}"
    print(json.dumps({"client": client, "tried": tried, "outcome": outcome, "reason": reason[:300]}), flush=True)


def with_openai() -> None:
    client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
    chat, ask = client.chat.completions, {"model": MODEL, "messages": ASK}

    def goes_on() -> bool:
        message = chat.create(**ask, **SHORT).choices[0].message
        return bool(chat.create(model=MODEL, messages=[*ASK, message, *ASK], **SHORT).choices[0].message.content)

    def called(stream: bool) -> bool:
        forced: Any = {**ask, "tools": [TOOL], "tool_choice": "required", "max_tokens": 200,
                       "parallel_tool_calls": False}  # fmt: skip
        if stream:
            with chat.stream(**forced) as events:
                message = events.until_done().get_final_completion().choices[0].message
        else:
            message = chat.create(**forced).choices[0].message
        return is_row(json.loads(message.tool_calls[0].function.arguments))

    def answered_after_a_call() -> bool:
        message = (
            chat.create(**ask, tools=[TOOL], tool_choice="required", max_tokens=200, parallel_tool_calls=False)
            .choices[0]
            .message
        )
        turns: Any = [
            *ASK,
            message,
            *({"role": "tool", "tool_call_id": c.id, "content": "3"} for c in message.tool_calls),
        ]
        return bool(chat.create(model=MODEL, messages=turns, tools=[TOOL], **SHORT).choices[0].message.content)

    def response(stream: bool) -> bool:
        asked: Any = {"model": MODEL, "input": "How many?", "max_output_tokens": 8}
        if stream:
            return [event.type for event in client.responses.create(**asked, stream=True)][-1] in (
                "response.completed", "response.incomplete",
            )  # fmt: skip
        return bool(client.responses.create(**asked).output_text)

    tell("openai", "models", lambda: MODEL in [model.id for model in client.models.list()])
    tell("openai", "chat", lambda: bool(chat.create(**ask, **SHORT).choices[0].message.content))
    tell("openai", "a second turn with the message as it came", goes_on)
    tell(
        "openai",
        "chat, streamed",
        lambda: any(p.choices[0].delta.content for p in chat.create(**ask, **SHORT, stream=True)),
    )
    tell(
        "openai",
        "`parse` with a pydantic model",
        lambda: is_row(chat.parse(**ask, response_format=Row).choices[0].message.parsed),
    )
    tell("openai", "a tool call", lambda: called(False))
    tell("openai", "a tool call, streamed", lambda: called(True))
    tell("openai", "the answer to a tool's result", answered_after_a_call)
    tell(
        "openai",
        "completions",
        lambda: bool(client.completions.create(model=MODEL, prompt="x", **SHORT).choices[0].text),
    )
    tell("openai", "responses", lambda: response(False))
    tell("openai", "responses, streamed", lambda: response(True))
    tell(
        "openai",
        "responses: `parse`",
        lambda: is_row(client.responses.parse(model=MODEL, input="x", text_format=Row).output_parsed),
    )
    tell("openai", "embeddings", lambda: bool(client.embeddings.create(model=MODEL, input="x")))
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]
    tell("openai", "an image", lambda: bool(chat.create(model=MODEL, messages=picture)))


def with_litellm() -> None:
    import litellm

    litellm.suppress_debug_info = True
    asked: Any = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": "none", "messages": ASK}

    def call() -> bool:
        made = litellm.completion(
            **asked, tools=[TOOL], tool_choice="required", max_tokens=200, parallel_tool_calls=False
        )
        return is_row(json.loads(made.choices[0].message.tool_calls[0].function.arguments))

    def form() -> bool:
        made = litellm.completion(**asked, response_format=Row, max_tokens=200)
        return is_row(json.loads(made.choices[0].message.content))

    tell("litellm", "chat", lambda: bool(litellm.completion(**asked, **SHORT).choices[0].message.content))
    tell("litellm", "chat, streamed", lambda: any(
        piece.choices[0].delta.content for piece in litellm.completion(**asked, **SHORT, stream=True)
    ))  # fmt: skip
    tell("litellm", "`response_format` with a pydantic model", form)
    tell("litellm", "a tool call", call)


def with_langchain() -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", max_tokens=200, max_retries=0, temperature=0)  # type: ignore[arg-type,call-arg]
    name = "langchain-openai"
    tell(name, "`invoke`", lambda: bool(model.invoke("How many?").content))
    tell(name, "`stream`", lambda: any(piece.content for piece in model.stream("How many?")))
    tell(name, "`batch`", lambda: len(model.batch(["a", "b"])) == 2)
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Row, method=method)  # type: ignore[arg-type]
        tell(name, f"`with_structured_output`, {method}", lambda structured=structured: is_row(structured.invoke("x")))  # type: ignore[misc]
    tools = model.bind_tools([TOOL], tool_choice="any", parallel_tool_calls=False)
    tell(name, "`bind_tools`", lambda: is_row(tools.invoke("x").tool_calls[0]["args"]))


def with_llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL, api_base=URL, api_key="none", is_chat_model=True, is_function_calling_model=True, max_tokens=200,
        max_retries=0, temperature=0,
    )  # fmt: skip
    turns = [ChatMessage(role="user", content="How many?")]
    tell("llama-index", "`chat`", lambda: bool(model.chat(turns).message.content))
    tell("llama-index", "`stream_chat`", lambda: any(piece.delta for piece in model.stream_chat(turns)))
    tell("llama-index", "`complete`", lambda: bool(model.complete("How many?").text))
    tell("llama-index", "`as_structured_llm`", lambda: is_row(model.as_structured_llm(Row).chat(turns).raw))


def with_instructor() -> None:
    import instructor

    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)
        tell("instructor", f"mode {mode.name}", lambda client=client: is_row(  # type: ignore[misc]
            client.chat.completions.create(model=MODEL, messages=ASK, response_model=Row, max_tokens=200, max_retries=0)
        ))  # fmt: skip


def with_pydantic_ai() -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=URL, api_key="none")
    settings: Any = {"max_tokens": 200, "temperature": 0}
    model = OpenAIChatModel(MODEL, provider=provider)

    def output(kind: Any, used: Any = model) -> bool:
        return is_row(asyncio.run(Agent(used, output_type=kind, model_settings=settings).run("x")).output)

    tell("pydantic-ai", "text", lambda: bool(asyncio.run(Agent(model, model_settings=settings).run("x")).output))
    tell("pydantic-ai", "`ToolOutput`", lambda: output(ToolOutput(Row)))
    tell("pydantic-ai", "`NativeOutput`", lambda: output(NativeOutput(Row)))
    responses = OpenAIResponsesModel(MODEL, provider=provider)
    tell("pydantic-ai", "`ToolOutput` over responses", lambda: output(ToolOutput(Row), responses))


def with_lm_eval() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    def score() -> bool:
        model = {
            "model": MODEL,
            "base_url": f"{URL}/completions",
            "tokenizer": FOLDER,
            "num_concurrent": 1,
            "max_retries": 1,
        }
        found = lm_eval.simple_evaluate(
            "local-completions", model_args=model, tasks=["colours"], bootstrap_iters=0,
            task_manager=TaskManager(include_path=f"{FOLDER}/tasks", include_defaults=False),
        )  # fmt: skip
        return 0 <= found["results"]["colours"]["acc,none"] <= 1

    tell("lm_eval", "a multiple-choice task", score)


if __name__ == "__main__":
    with_openai()
    with_litellm()
    with_langchain()
    with_llama_index()
    with_instructor()
    with_pydantic_ai()
    with_lm_eval()
