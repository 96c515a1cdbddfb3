"""An answer taken apart into its text, its reasoning and its calls, whole or as it is made: one description for both.

The text is cut by transformers' `ResponseParser`, by the family's own response template or by one made of the form of its
calls (`call_form`). What lies inside a call is read here a character at a time, so that the arguments go on as they come.
What cannot be read as a call of one of the tools is text.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub_lite.bases.chat.call_form import AnswerForm, CallForm, Tools

# transformers' description of a field, as JSON has it.
Field = dict[str, Any]
VERBATIM: Field = {"content": "text", "content_args": {"strip": False}}
# The names that families give it.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
ARGUMENT_KEYS = ("arguments", "parameters")
WORD = re.compile(r"[\w.-]+")
# The beginning of a call's object, up to where its arguments begin.
HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*(?:"function"\s*:\s*\{\s*)?'
    r'"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{'
)


@dataclass(frozen=True)
class Piece:
    """What an answer goes on with: some `text`, some `reasoning`, a `call` by its name, or some of its `arguments`.

    `index` counts the calls of the answer.
    """

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str
    index: int = 0


@dataclass(frozen=True)
class ReadCall:
    """A call with its arguments as JSON, which an answer that was cut off leaves unfinished."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ReadAnswer:
    """An answer taken apart."""

    text: str
    reasoning: str
    calls: tuple[ReadCall, ...]


def read_answer(form: AnswerForm, tools: Tools, text: str) -> ReadAnswer:
    """Take a whole answer apart."""
    reader = AnswerReader(form, tools)
    return joined([*reader.feed(text), *reader.finish()])


def joined(pieces: Sequence[Piece]) -> ReadAnswer:
    """The answer that pieces make."""
    calls: list[ReadCall] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append(ReadCall(piece.text, ""))
        elif piece.kind == "arguments":
            calls[piece.index] = ReadCall(calls[piece.index].name, calls[piece.index].arguments + piece.text)
    text, reasoning = ("".join(one.text for one in pieces if one.kind == kind) for kind in ("text", "reasoning"))
    return ReadAnswer(text, reasoning, tuple(calls))


def response_template(form: AnswerForm, tools: Tools) -> Field:
    """A form as transformers' parser takes it. A call's body is text, to be read here, wherever it is JSON."""
    if form.response_template is not None:
        return _own_template(form.response_template)
    fields: dict[str, Field] = {}
    if form.harmony:
        fields["reasoning_content"] = {"open": "<|channel|>analysis<|message|>", "close": "<|end|>", **VERBATIM}
        fields["text"] = {
            "open_pattern": r"<\|channel\|>(?:final|commentary)<\|message\|>", "close": ["<|end|>", "<|return|>"],
            **VERBATIM, "repeats": True,
        }  # fmt: skip
        fields["tool_calls"] = {
            "open_pattern": r"(?:<\|channel\|>commentary)?\s*to=functions\.", "close": "<|call|>", **VERBATIM,
            "repeats": True,
        }  # fmt: skip
        return {"start_anchor": "<|start|>assistant", "fields": fields}
    if form.reasoning is not None:
        opening, closing = form.reasoning
        fields["reasoning_content"] = {"open": opening, "close": closing, **VERBATIM, "repeats": True}
    if tools and form.call.kind != "unknown":
        fields["tool_calls"] = _calls_field(form.call)
    return {"start_anchor": "\0", "fields": {**fields, "text": VERBATIM}}


def _calls_field(call: CallForm) -> Field:
    if call.kind == "tagged":
        return {
            "open_pattern": rf"{re.escape(call.tag)}\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": rf"</function>\s*{re.escape(call.end_tag)}",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        }
    # Without a tag, an answer that begins with JSON is a call.
    opened: Field = (
        {"open": call.tag} if call.tag else {"open_pattern": r'\A\s*(?:<\|python_tag\|>)?(?=\s*[\[{]\s*["{])'}
    )
    return opened | ({"close": call.end_tag} if call.end_tag else {}) | VERBATIM | {"repeats": True}


def _own_template(template: Mapping[str, Any]) -> Field:
    fields = dict(template["fields"])
    for name, field in fields.items():
        arguments = field.get("content_args") or {}
        plain = field.get("content") == "json" and not {"unquoted_keys", "string_delims"} & arguments.keys()
        named = re.search(r"\{name\}", json.dumps(field.get("transform")))
        if name == "tool_calls" and plain and not named:
            kept = {key: value for key, value in field.items() if not key.startswith(("transform", "content"))}
            fields[name] = kept | VERBATIM | {"repeats": True}
        elif field.get("content") == "json":
            # What is no JSON is handed on as it is, instead of an error in the middle of an answer.
            fields[name] = field | {"content_args": arguments | {"allow_non_json": True}}
        elif field.get("content", "text") == "text":
            fields[name] = field | VERBATIM
    return {**template, "fields": fields}


class AnswerReader:
    """Reads one answer as it is made; however it is cut into pieces, they join to the same answer."""

    def __init__(self, form: AnswerForm, tools: Tools = ()) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        described = response_template(form, tools)
        begun = form.reasoning[0] if form.in_reasoning and form.reasoning is not None else ""
        self._parser = ResponseParser(described, prefix=begun, tools=[dict(tool) for tool in tools])
        field = described["fields"].get("tool_calls", {})
        self._tags = [tag if isinstance(tag, str) else "" for tag in (field.get("open"), field.get("close"))]
        self._named = form.harmony or form.call.kind == "named"
        self._read_here = field.get("content") == "text"
        self._names = {tool["function"]["name"] for tool in tools}
        self._calls = 0
        self._body: CallBody | None = None
        self._raw = ""
        self._spaces, self._begun, self._after_region = "", False, False
        self._opened = self._parser.initial_events

    def feed(self, text: str) -> list[Piece]:
        """Take some more of the answer; return what is certain now."""
        events = [*self._opened, *self._parser.feed(text)]
        self._opened = []
        return _merged(piece for event in events for piece in self._handle(event))

    def finish(self) -> list[Piece]:
        """Return what was held back: the end of the answer has come."""
        self._tags[1] = ""  # what is still open has no end
        _, events = self._parser.finalize()
        pieces = [piece for event in [*self._opened, *events] for piece in self._handle(event)]
        if self._spaces and (self._begun or not self._after_region):
            pieces.append(Piece("text", self._spaces))
        return _merged(pieces)

    def _handle(self, event: Mapping[str, Any]) -> Iterator[Piece]:
        field, kind = event["field"], event["type"]
        if field in ("text", "content"):
            if kind == "region_chunk":
                yield from self._text(event["text"])
            return
        if kind == "region_open":
            # White space around calls and reasoning belongs to the form.
            self._spaces, self._begun, self._after_region, self._raw = "", False, True, ""
            self._body = CallBody(self._named, self._names, self._calls) if field == "tool_calls" else None
        elif field in REASONING_FIELDS and kind == "region_chunk":
            yield from self._reasoning(event["text"])
        elif field == "tool_calls" and self._body is not None:
            if kind == "region_chunk":
                self._raw += event["text"]
                if self._read_here:
                    yield from self._body.feed(event["text"])
            else:
                yield from self._close_call(self._body, event["value"])
        if kind == "region_close":
            self._spaces, self._begun = "", False

    def _close_call(self, body: "CallBody", value: object) -> Iterator[Piece]:
        if not self._read_here:
            yield from body.take(value)
        self._calls += body.found
        yield from self._text(body.finish() if body.found else self._tags[0] + self._raw + self._tags[1])

    def _text(self, text: str) -> Iterator[Piece]:
        text = self._spaces + text
        if self._after_region and not self._begun:
            text = text.lstrip()
        told = text.rstrip()
        self._spaces = text[len(told) :]
        if told:
            self._begun = True
            yield Piece("text", told)

    def _reasoning(self, text: str) -> Iterator[Piece]:
        text = self._spaces + text
        if not self._begun:
            text = text.lstrip()
        told = text.rstrip()
        self._spaces = text[len(told) :]
        if told:
            self._begun = True
            yield Piece("reasoning", told)


def _merged(pieces: Iterator[Piece] | Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and piece.kind != "call" and (last.kind, last.index) == (piece.kind, piece.index):
            merged[-1] = Piece(piece.kind, last.text + piece.text, piece.index)
        else:
            merged.append(piece)
    return merged


class CallBody:
    """The inside of a call: one JSON object, several or a list of them, or a name with an object after it.

    `found` counts the calls that were read. A call counts when its name is one of `names`; `unread` is what is none. Where the
    name comes first, as families write it, arguments go on as they come; otherwise they come when the object is whole.
    """

    def __init__(self, named: bool, names: Collection[str], first: int) -> None:
        self.found, self.unread = 0, ""
        self._named, self._names, self._first = named, names, first
        self._before, self._object = "", ""
        self._depth, self._in_string, self._escaped = 0, False, False
        # How deep the arguments began that are handed on now.
        self._arguments: int | None = None
        self._begun = False

    def feed(self, text: str) -> Iterator[Piece]:
        """Take some more of the body."""
        for character in text:
            if not self._object and character != "{":
                self._before += character
                continue
            if not self._object:
                yield from self._begin()
            self._object += character
            self._follow(character)
            if self._arguments is not None:
                yield Piece("arguments", character, self._first + self.found - 1)
                self._arguments = self._arguments if self._depth > self._arguments else None
            elif character == "{" and not self._begun:
                yield from self._begin_inside()
            if self._depth == 0:
                yield from self._end()

    def take(self, value: object) -> Iterator[Piece]:
        """Take a call, or a list of calls, that was read as JSON."""
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if name in self._names:
                arguments: Any = next((function[key] for key in ARGUMENT_KEYS if key in function), {})
                told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                yield from self._call(str(name))
                yield Piece("arguments", told, self._first + self.found - 1)

    def finish(self) -> str:
        """What was not read as a call."""
        return self.unread + ("" if self._begun else self._object) + (self._before if self._named else "")

    def _begin(self) -> Iterator[Piece]:
        """An object begins: of a named call it is the arguments."""
        name = next((word for word in WORD.findall(self._before) if word in self._names), None)
        if self._named and name is not None:
            self._arguments = 0
            yield from self._call(name)
        self._before = ""

    def _begin_inside(self) -> Iterator[Piece]:
        """A further object begins in that of a call: perhaps its arguments, after its name."""
        head = HEAD.fullmatch(self._object)
        if head is not None and head["name"] in self._names:
            self._arguments = self._depth - 1
            yield from self._call(head["name"])
            yield Piece("arguments", "{", self._first + self.found - 1)

    def _call(self, name: str) -> Iterator[Piece]:
        self._begun = True
        self.found += 1
        yield Piece("call", name, self._first + self.found - 1)

    def _follow(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        else:
            self._depth += (character in "{[") - (character in "}]")

    def _end(self) -> Iterator[Piece]:
        """An object is whole."""
        if not self._begun:
            found = self.found
            with suppress(ValueError):
                yield from self.take(json.loads(self._object))
            self.unread += "" if self.found > found else self._object
        self._object, self._begun = "", False
