"""The grammar that a forced call is written by: the form of the family around arguments that follow their schema.

In the Lark dialect of llguidance. Tokens of the vocabulary that the form is made of, such as `<tool_call>`, are written as
those tokens, since a model has learned them so.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from adapterhub_lite.bases.chat.call_form import AnswerForm, CallForm, Tools
from adapterhub_lite.serving.api.errors import ApiRefusal

Json = dict[str, Any]
MOST_CALLS = 16
# As templates write JSON, so that a model is not led astray; and no white space without end.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What may say of an object's other keys; without any of it, arguments are those that have a name.
OTHER_KEYS = frozenset({
    "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties", "$ref", "allOf",
    "anyOf", "oneOf", "if", "enum", "const",
})  # fmt: skip


def parameters_of(tool: Mapping[str, Any]) -> Json:
    """The schema of a tool's arguments: an object, of the named properties alone unless it says otherwise."""
    given = {"type": "object", **(tool["function"].get("parameters") or {})}
    return given if given.keys() & OTHER_KEYS else {**given, "additionalProperties": False}


def call_grammar(
    form: AnswerForm, tools: Tools, special: Mapping[str, int], *, several: bool, text: Mapping[str, Any] | None
) -> str:
    """The grammar of answers with calls of `tools`: calls alone, or with `text` text or calls.

    `text` has the form of the text as GenerationRequest takes it; empty, it may be any, and calls may follow it.
    `special` are the vocabulary's own tokens by their text.

    Raises:
        ApiRefusal: calls of this form cannot be forced.
    """
    call = form.call
    if call.kind == "unknown":
        reason = "How this model's chat template writes a call is not known, so none can be forced. Ask with response_format."
        raise ApiRefusal(400, reason, "invalid_value", param="tools")
    rules = _Rules(special)
    names = [rules.call(number, tool, call) for number, tool in enumerate(tools)]
    one = f"({' | '.join(names)})"
    more = call.following if several and call.following is not None else None
    repeated = f" ({rules.text(more)} {one}){{0,{MOST_CALLS - 1}}}" if more is not None else ""
    calls = f"{one}{repeated} {rules.text(call.closing)}"
    if text is None:
        return rules.lark(f"start: {rules.text(call.opening)} {calls}")
    opening = call.opening[call.opening.rfind(call.tag) :] if call.tag else call.opening
    if text:
        body = f"({rules.text_of(text)} | {rules.text(opening)} {calls})"
        return rules.lark(f"start: {rules.thought(form)} {body}")
    return rules.lark(rules.after_text(opening, call.tag, calls))


def text_grammar(form: AnswerForm, special: Mapping[str, int], text: Mapping[str, Any]) -> str:
    """The grammar of an answer whose text has a form, where the template has begun the reasoning before it."""
    rules = _Rules(special)
    return rules.lark(f"start: {rules.thought(form)} {rules.text_of(text)}")


class _Rules:
    """The rules of one grammar."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._pieces = re.compile(
            "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or r"\A\Z"
        )
        self._made: list[str] = []

    def text(self, text: str) -> str:
        """A text as it stands, special tokens as such; nothing for an empty one."""
        parts, at = [], 0
        for found in self._pieces.finditer(text):
            parts += [_quoted(text[at : found.start()]), f"<[{self._special[found[0]]}]>"]
            at = found.end()
        return " ".join(part for part in (*parts, _quoted(text[at:])) if part)

    def call(self, number: int, tool: Mapping[str, Any], form: CallForm) -> str:
        """A rule for the calls of one tool: its name and its arguments."""
        name, parameters = tool["function"]["name"], parameters_of(tool)
        if form.kind == "tagged":
            arguments = self._tagged(number, name, parameters)
        else:
            self._made.append(f"arguments_{number}: %json {json.dumps(parameters | {'x-guidance': SPACING})}")
            arguments = f"{self.text(form.middle)} arguments_{number}"
        self._made.append(f"call_{number}: {self.text(name)} {arguments}")
        return f"call_{number}"

    def _tagged(self, number: int, tool: str, parameters: Json) -> str:
        """The arguments of one tool as tags, in the order of its schema."""
        required, parts = parameters.get("required", ()), []
        for index, (name, schema) in enumerate(parameters.get("properties", {}).items()):
            value = f"value_{number}_{index}"
            self._made.append(value + _tagged_value(tool, name, schema, parameters))
            one = f"{_quoted(f'<parameter={name}>' + chr(10))} {value}"
            parts.append(one if name in required else f"({one})?")
        return " ".join([_quoted(">\n"), *parts, _quoted("</function>")])

    def text_of(self, form: Mapping[str, Any]) -> str:
        """The text in a form as GenerationRequest takes it."""
        ((kind, value),) = form.items()
        if kind == "schema":
            self._made.append(f"form: %json {json.dumps(value | {'x-guidance': SPACING})}")
            return "form"
        if kind == "choices":
            return f"({' | '.join(_quoted(choice) for choice in value)})"
        reason = f"With tools, and after reasoning, the answer's form may be a schema or choices, not a {kind}."
        raise ApiRefusal(400, reason, "invalid_value", param="response_format")

    def thought(self, form: AnswerForm) -> str:
        """What comes before the answer where the template has begun to reason: any text up to the end of reasoning."""
        if form.reasoning is None or not form.in_reasoning:
            return ""
        end = form.reasoning[1]
        self._made.append(r"THOUGHT: /(.|\n)*/")
        if end in self._special:
            return f"THOUGHT? {self.text(end)} {_quoted(chr(10) * 2)}"
        self._made.append(f"thought[lazy]: THOUGHT {_quoted(end)}")
        return f"thought {_quoted(chr(10) * 2)}"

    def after_text(self, opening: str, tag: str, calls: str) -> str:
        """Any text, or any text and then calls; the text does not hold the tag that a call begins with."""
        if not tag:
            self._made.append(r"PLAIN: /[^{](.|\n)*/")
            return f"start: PLAIN | {self.text(opening)} {calls}"
        self._made.append(r"TEXT: /(.|\n)*/")
        if self._pieces.match(tag):
            return f"start: TEXT | TEXT? {self.text(opening)} {calls}"
        self._made.append(f"head[lazy]: TEXT {_quoted(tag)}")
        return f"start: TEXT | head {self.text(opening[len(tag) :])} {calls}"

    def lark(self, start: str) -> str:
        """The grammar with this rule first."""
        return "\n".join([start, *self._made])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _tagged_value(tool: str, name: str, schema: Any, parameters: Json) -> str:
    """What a rule's name is followed by, for a value and the tag behind it: JSON, or for a string its text."""
    end = _quoted("\n</parameter>\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    given = schema if isinstance(schema, dict) else {}
    options = given.get("enum") or ([given["const"]] if "const" in given else [])
    if options and all(isinstance(option, str) and "<" not in option for option in options):
        return f": ({' | '.join(_quoted(option) for option in options)}) {end}"
    if kind == "string" and not schema.keys() & {"pattern", "format"}:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return f"[lazy]: /[^<]{{{least},{most}}}/ {end}"
    if kind in ("integer", "number", "boolean", "object", "array") and not options:
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        return f": %json {json.dumps(schema | shared | {'x-guidance': SPACING})} {end}"
    reason = (
        f"The argument {name!r} of {tool!r} cannot be forced in the form of this model's calls, where values stand between "
        "tags: give it one plain type, and a string no pattern or format."
    )
    raise ApiRefusal(400, reason, "invalid_value", param="tools")


def special_tokens(added: Mapping[int, object]) -> dict[str, int]:
    """The tokens that a tokenizer has beside its vocabulary, by their text; `added` is its `added_tokens_decoder`."""
    return {str(token): number for number, token in added.items() if str(token).strip()}
