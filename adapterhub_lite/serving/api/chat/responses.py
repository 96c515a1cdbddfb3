"""POST /v1/responses: OpenAI's newer format over the same chat. Its items become messages, an answer's pieces its events.

Nothing is stored, so an earlier response cannot be named: the whole conversation is sent each time.
"""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from adapterhub_lite.bases.chat.answer_reader import Piece
from adapterhub_lite.serving.api.chat.messages import Function, FunctionName
from adapterhub_lite.serving.api.chat.tool_calls import ChatDeltas
from adapterhub_lite.serving.api.dispatch import ResolvedModel
from adapterhub_lite.serving.api.errors import ApiRefusal, error_body
from adapterhub_lite.serving.api.wire.fields import ModelName, Text, WireModel, without_nulls
from adapterhub_lite.serving.api.wire.requests import ChatRequest
from adapterhub_lite.serving.engine.request import GenerationChunk, GenerationResult

Json = dict[str, Any]
# What clients send of themselves and asks for nothing; with another value it is refused.
NOTHING: Json = {
    "background": (False,), "include": ([],), "max_tool_calls": (), "metadata": ({},), "previous_response_id": (),
    "prompt": (), "prompt_cache_key": (), "reasoning": ({},), "safety_identifier": (), "service_tier": ("auto", "default"),
    "store": (False,), "stream_options": ({},), "top_logprobs": (0,), "truncation": ("disabled",), "conversation": (),
    "prompt_cache_retention": (),
}  # fmt: skip


class InputText(WireModel):
    """A piece of a message's content, either way; what an earlier answer had besides is left out."""

    type: Literal["input_text", "output_text", "reasoning_text", "text"]
    text: Text
    annotations: tuple[()] = ()
    logprobs: tuple[()] = ()


Content = Text | tuple[InputText, ...]


class MessageItem(WireModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Text | None = None
    status: Text | None = None


class CallItem(WireModel):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Text
    name: FunctionName
    arguments: Text
    id: Text | None = None
    status: Text | None = None


class CallOutputItem(WireModel):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content
    id: Text | None = None
    status: Text | None = None


class ReasoningItem(WireModel):
    """The reasoning of an earlier answer."""

    type: Literal["reasoning"]
    summary: tuple[()] = ()
    content: tuple[InputText, ...] = ()
    id: Text | None = None
    status: Text | None = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem


class FlatTool(Function):
    """A function, with its type beside its name."""

    type: Literal["function"]


class FlatChoice(WireModel):
    """The one tool to call."""

    type: Literal["function"]
    name: FunctionName


class FlatFormat(WireModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Text | None = None
    description: Text | None = None
    json_schema: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(WireModel):
    """How the text of the answer is to be."""

    format: FlatFormat | None = None


class ResponsesRequest(WireModel):
    """POST /v1/responses."""

    model: ModelName
    input: Text | Annotated[tuple[Item, ...], Field(min_length=1, max_length=1000)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float = Field(1.0, ge=0, le=2, strict=True)
    top_p: float = Field(1.0, gt=0, le=1, strict=True)
    stream: bool = Field(False, strict=True)
    tools: Annotated[tuple[FlatTool, ...], Field(max_length=128)] = ()
    tool_choice: Literal["none", "auto", "required"] | FlatChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextSettings = TextSettings()
    user: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:  # whatever JSON holds
        if not isinstance(data, dict):
            return data
        asked = {key: value for key, value in data.items() if not (key in NOTHING and value in (None, *NOTHING[key]))}
        return without_nulls(asked, (), cls.model_fields.keys() - {"model", "input"})

    def chat(self) -> ChatRequest:
        """The same as a request for a chat.

        Raises:
            ApiRefusal: it makes none, such as a schema without a name.
        """
        given = self.text.format
        format_: Json | None = None
        if given is not None and given.type == "json_schema":
            format_ = {"type": "json_schema", "json_schema": {"name": given.name, "schema": given.json_schema}}
        elif given is not None and given.type == "json_object":
            format_ = {"type": "json_object"}
        choice: Any = self.tool_choice
        if isinstance(choice, FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools
        ]
        try:
            return ChatRequest.model_validate(
                {
                    "model": self.model,
                    "messages": self._messages(),
                    "max_completion_tokens": self.max_output_tokens,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "stream": self.stream,
                    "tools": tools,
                    "tool_choice": None if choice == "auto" else choice,
                    "parallel_tool_calls": self.parallel_tool_calls,
                    "response_format": format_,
                }
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ApiRefusal(
                400, f"{where or 'input'}: {first['msg']}", "invalid_request", param=where or None
            ) from None

    def _messages(self) -> list[Json]:
        messages: list[Json] = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        reasoning: str | None = None
        for item in self.input:
            if isinstance(item, ReasoningItem):
                reasoning = _joined(item.content) or None
                continue
            if isinstance(item, CallOutputItem):
                made: Json = {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
            elif isinstance(item, MessageItem):
                made = {"role": item.role, "content": _joined(item.content)}
            else:
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                if messages and messages[-1]["role"] == "assistant" and reasoning is None:
                    # Text and calls of one answer are one message.
                    messages[-1].setdefault("tool_calls", []).append(call)
                    continue
                made = {"role": "assistant", "content": None, "tool_calls": [call]}
            if made["role"] == "assistant" and reasoning is not None:
                made["reasoning_content"], reasoning = reasoning, None
            messages.append(made)
        return messages


def _joined(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class StreamedResponse:
    """One answer as a response: its output items, and the events that tell of them in OpenAI's order."""

    def __init__(self, body: ResponsesRequest, request_id: str, resolved: ResolvedModel, deltas: ChatDeltas) -> None:
        self._body, self._resolved, self._deltas = body, resolved, deltas
        self._id, self._created = f"resp_{request_id}", int(time.time())
        self._output: list[Json] = []
        self._open: str | None = None
        self._told = 0
        self._result: GenerationResult | None = None

    def events(self, index: int, chunk: GenerationChunk) -> list[str]:
        """The events of some more of the answer."""
        begun = self._begin() if not self._told else []
        self._result = chunk.result
        pieces = self._deltas.take(chunk.text, last=chunk.done)
        return [*begun, *(event for piece in pieces for event in self._write(piece))]

    def _begin(self) -> list[str]:
        response = self.response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def end(self, usage: Json) -> list[str]:
        """The last events: the whole response."""
        result = self._result
        assert result is not None, "the last piece has the result"
        events = list(self._close("incomplete" if result.finish_reason == "length" else "completed"))
        if not self._output:
            events += [*self._open_item("text", ""), *self._close("completed")]
        response = self.response(self._status(result), result)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def failed(self, error: Exception) -> str:
        """The last event of a stream that failed in the middle."""
        told = error_body(error)[1]["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def response(self, status: str, result: GenerationResult | None = None) -> Json:
        """The response as it is now."""
        body, incomplete = self._body, status == "incomplete"
        given = body.text.format or FlatFormat(schema=None)
        settings = {
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": body.model,
            "parallel_tool_calls": body.parallel_tool_calls, "previous_response_id": None, "store": False,
            "temperature": body.temperature, "top_p": body.top_p, "truncation": "disabled", "user": body.user,
            "metadata": {}, "background": False, "reasoning": {"effort": None, "summary": None},
            "text": {"format": given.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools],
        }  # fmt: skip
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None, "output": list(self._output),
            "usage": None if result is None else _usage(result), **settings, "receipt": self._resolved.receipt(),
        }  # fmt: skip

    def whole(self, result: GenerationResult) -> Json:
        """The response of a whole answer."""
        self.events(0, GenerationChunk(result.text, done=True, result=result))
        self.end({})
        return self.response(self._status(result), result)

    def _status(self, result: GenerationResult) -> str:
        return "incomplete" if result.finish_reason == "length" else "completed"

    def _write(self, piece: Piece) -> Iterator[str]:
        kind = "call" if piece.kind == "arguments" else piece.kind
        if piece.kind == "call" or self._open != kind:
            yield from self._close("completed")
            yield from self._open_item(kind, piece.text)
        item, at = self._output[-1], self._at()
        if piece.kind == "arguments":
            item["arguments"] += piece.text
            yield self._event("response.function_call_arguments.delta", **at, delta=piece.text)
        elif piece.kind == "text":
            item["content"][0]["text"] += piece.text
            yield self._event("response.output_text.delta", **at, content_index=0, delta=piece.text, logprobs=[])
        elif piece.kind == "reasoning":
            item["content"][0]["text"] += piece.text
            yield self._event("response.reasoning_text.delta", **at, content_index=0, delta=piece.text)

    def _open_item(self, kind: str, text: str) -> Iterator[str]:
        self._open, number = kind, uuid.uuid4().hex
        if kind == "call":
            item: Json = {"id": f"fc_{number}", "type": "function_call", "call_id": f"call_{number[:24]}", "name": text,
                          "arguments": ""}  # fmt: skip
        elif kind == "reasoning":
            item = {"id": f"rs_{number}", "type": "reasoning", "summary": [], "content": []}
        else:
            item = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=self._at()["output_index"], item=_copy(item))
        if kind != "call":
            item["content"].append(_part(kind, ""))
            yield self._event("response.content_part.added", **self._at(), content_index=0, part=_part(kind, ""))

    def _close(self, status: str) -> Iterator[str]:
        if self._open is None:
            return
        item, at, kind, self._open = self._output[-1], self._at(), self._open, None
        item["status"] = status
        if kind == "call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **at, **told)
        else:
            text = item["content"][0]["text"]
            name = "output_text" if kind == "text" else "reasoning_text"
            more: Json = {"logprobs": []} if kind == "text" else {}
            yield self._event(f"response.{name}.done", **at, content_index=0, text=text, **more)
            yield self._event("response.content_part.done", **at, content_index=0, part=_part(kind, text))
        yield self._event("response.output_item.done", output_index=at["output_index"], item=_copy(item))

    def _at(self) -> Json:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _event(self, kind: str, /, **fields: Any) -> str:
        told = {"type": kind, "sequence_number": self._told, **fields}
        self._told += 1
        return f"event: {kind}\ndata: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _copy(item: Json) -> Json:
    copied: Json = json.loads(json.dumps(item))
    return copied


def _usage(result: GenerationResult) -> Json:
    return {
        "input_tokens": result.usage.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": result.usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.usage.total_tokens,
    }  # fmt: skip
