"""The messages of a conversation on the wire, tools and calls included, and what the chat template gets of them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from adapterhub_lite.serving.api.errors import ApiRefusal
from adapterhub_lite.serving.api.wire.fields import Text, WireModel, without_nulls

Json = dict[str, Any]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
# What servers send with a message and nobody reads.
UNUSED_OF_MESSAGES = frozenset({"annotations", "audio", "function_call", "refusal"})


class TextPart(WireModel):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class Function(WireModel):
    """A function that the model may call; `strict` has its arguments follow the schema in any case."""

    name: FunctionName
    description: Text | None = None
    parameters: Json | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, parameters: Json | None) -> Json | None:
        if parameters and parameters.get("type", "object") != "object":
            raise ValueError("the arguments of a function are an object: give a schema of type object")
        return parameters


class Tool(WireModel):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function

    def plain(self) -> Json:
        """The tool as chat templates take it; several read a description and parameters without asking."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {
            "type": "function",
            "function": {"description": "", "parameters": {"type": "object", "properties": {}}} | function,
        }


class NamedFunction(WireModel):
    """A function by its name."""

    name: FunctionName


class ToolChoice(WireModel):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(WireModel):
    """A function with the arguments it was called with, as JSON."""

    name: Text
    arguments: Text

    def values(self) -> Json:
        """The arguments.

        Raises:
            ApiRefusal: they are not a JSON object.
        """
        try:
            found = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            reason = f"messages: the arguments of the call of {self.name!r} are not a JSON object."
            raise ApiRefusal(400, reason, "invalid_value", param="messages")
        return found


class MadeCall(WireModel):
    """A call that an earlier answer made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(WireModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Text | tuple[TextPart, ...] | None = None
    name: Text | None = None
    tool_calls: Annotated[tuple[MadeCall, ...], Field(max_length=128)] = ()
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:  # whatever JSON holds
        if isinstance(data, dict):
            # An answer of ours, or of another server, sent back as it was received.
            data = {
                key: value for key, value in data.items() if not (key in UNUSED_OF_MESSAGES and value in (None, []))
            }
        return without_nulls(data, (), {"name", "tool_calls", "tool_call_id", "reasoning_content"})

    @model_validator(mode="after")
    def _by_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: a message needs text, unless it is the assistant's and calls tools")
        if (self.tool_calls or self.reasoning_content) and self.role != "assistant":
            raise ValueError("tool_calls and reasoning_content belong to messages of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError(
                "tool_call_id belongs to a message of a tool, which needs it: the id of the call it answers"
            )
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    @property
    def length(self) -> int:
        """Characters in all."""
        calls = sum(len(call.function.name) + len(call.function.arguments) for call in self.tool_calls)
        return len(self.text) + len(self.reasoning_content or "") + calls

    def plain(self) -> Json:
        """The message as chat templates take it, arguments as an object."""
        plain: Json = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        for key in ("name", "tool_call_id", "reasoning_content"):
            plain |= {} if getattr(self, key) is None else {key: getattr(self, key)}
        calls = [
            {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": call.function.values()}}
            for call in self.tool_calls
        ]  # fmt: skip
        return plain | ({"tool_calls": calls} if calls else {})


def conversation(messages: Sequence[ChatMessage]) -> list[Json]:
    """Messages as chat templates take them; a tool's answer has the name of the function that it answers.

    Raises:
        ApiRefusal: a tool answers a call that nobody made, or arguments are not JSON.
    """
    names: dict[str, str] = {}
    turns = []
    for number, message in enumerate(messages):
        turn = message.plain()
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                where = f"messages.{number}"
                reason = (
                    f"{where}: the tool answers the call {message.tool_call_id!r}, which no message before it made."
                )
                raise ApiRefusal(400, reason, "invalid_value", param=where)
            turn = {"name": names[message.tool_call_id], **turn}
        names |= {call.id: call.function.name for call in message.tool_calls}
        turns.append(turn)
    return turns
