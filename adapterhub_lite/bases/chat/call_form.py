"""How a family writes its tool calls and its reasoning, read off its own chat template.

A template that reads tools writes the calls of earlier turns as its model writes new ones. So a conversation with calls of
a known name and known arguments is laid out, and what stands around those is the form. Where a template reads no tools,
they are put into words for it, in the form that most families know (Hermes): `without_tools`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adapterhub_lite.bases.chat.template import Turn, words_of

Tools = Sequence[Mapping[str, Any]]
# (turns, tools, whether up to where the model begins its answer) -> text; ValueError: the template refuses them.
Render = Callable[[Sequence[Turn], Tools, bool], str]
Kind = Literal["json", "named", "tagged", "unknown"]

NAME, KEY, VALUE, TEXT = "probe_function", "probe_key", "probe_value", "probe text"
ARGUMENTS = {KEY: VALUE}
# Mistral's templates want an id of nine letters and digits.
CALL_ID = "a1b2c3d4e"
PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": TEXT,
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": TEXT}},
            "required": [KEY],
        },
    },
}
ASKED: Turn = {"role": "user", "content": TEXT}
REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
HARMONY = ("<|channel|>analysis", "to=functions.")


@dataclass(frozen=True)
class CallForm:
    """Calls as they are written: `opening` NAME `middle` ARGUMENTS, for each further one `following` NAME `middle`
    ARGUMENTS, at the end `closing`.

    `kind` says how one is read: "json" (name and arguments in one JSON object, or a list of them), "named" (the name,
    then the arguments as JSON), "tagged" (`<function=NAME>` with a `<parameter=KEY>` for each argument), or "unknown".
    It lies between `tag` and `end_tag`, either of which may be "". `following` None: one call in an answer.
    """

    kind: Kind = "unknown"
    opening: str = ""
    middle: str = ""
    closing: str = ""
    following: str | None = None
    tag: str = ""
    end_tag: str = ""


HERMES = CallForm(
    "json",
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    '}\n</tool_call>\n<tool_call>\n{"name": "',
    "<tool_call>",
    "</tool_call>",
)
HERMES_TOOLS = """You may call these functions:
<tools>
{tools}
</tools>
To call one, answer with
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may hold besides text: calls, and reasoning between the two texts of `reasoning`.

    `in_reasoning`: the template begins the reasoning itself. `reads_tools`: the template takes tools. `harmony`: channels,
    as gpt-oss writes them. `response_template`: the family's own description, for transformers' parser.
    """

    call: CallForm = HERMES
    reasoning: tuple[str, str] | None = None
    in_reasoning: bool = False
    reads_tools: bool = False
    harmony: bool = False
    response_template: Mapping[str, Any] | None = None

    @property
    def plain(self) -> bool:
        """Whether an answer without calls is its text and nothing else."""
        return self.reasoning is None and not self.harmony and self.response_template is None


def answer_form(template: str, render: Render, response_template: Mapping[str, Any] | None = None) -> AnswerForm:
    """How answers to chats laid out by `template` are written; `render` lays out by it.

    Raises:
        ValueError: the template refuses the plainest chat.
    """
    reads_tools = "tools" in words_of(template)
    asked = render([ASKED], (), True)
    reasoning = next((tags for tags in REASONING if tags[1] in template), None)
    in_reasoning = reasoning is not None and _is_open(asked, reasoning)
    call = _call_form(render, reasoning) if reads_tools else HERMES
    if not reads_tools and in_reasoning and reasoning is not None:
        call = replace(call, opening=f"{reasoning[1]}\n\n{call.opening}")
    harmony = all(words in template for words in HARMONY)
    return AnswerForm(call, reasoning, in_reasoning, reads_tools, harmony, response_template)


def may_reason(template: str) -> bool:
    """Whether answers to chats laid out by a template may hold reasoning, or channels."""
    return any(end in template for _, end in REASONING) or all(words in template for words in HARMONY)


def _call_form(render: Render, reasoning: tuple[str, str] | None) -> CallForm:
    """The form of the calls that a template writes."""
    tools = [PROBE_TOOL]
    asked = render([ASKED], tools, True)
    for with_id in (False, True):
        try:
            one, end = render([ASKED, _calls(1, with_id)], tools, False), _end_of_turn(render, tools)
            break
        except ValueError:
            continue
    else:
        return CallForm()
    try:
        two: str | None = render([ASKED, _calls(2, with_id)], tools, False)
    except ValueError:
        two = None
    begun = asked.rfind(reasoning[0]) if reasoning is not None and _is_open(asked, reasoning) else len(asked)
    start = _common(asked[:begun], one)
    written = one[start:]
    at = written.find(NAME)
    if at < 0:
        return CallForm()
    body, opening = written[at + len(NAME) :], written[:at]
    # Reasoning is none of the call's; what is read as its tag begins after it.
    tag = opening.rpartition(reasoning[1])[2] if reasoning is not None else opening
    if reasoning is not None and begun < len(asked):
        # The template has begun to reason, and the answer ends it.
        ended = opening.removeprefix(asked[begun:]).removeprefix(reasoning[0])
        opening = ended if reasoning[1] in opening else f"{reasoning[1]}\n\n{opening}"
    pieces = two[start:].split(NAME) if two is not None else []
    if "<function=" in tag and "<parameter=" in body:
        inside = re.compile(r".*?</function>", re.DOTALL)
        closing = _until(inside.sub("", body, count=1), end)
        following = inside.sub("", pieces[1], count=1) if len(pieces) == 3 else None
        tag = tag.partition("<function=")[0].strip()
        return CallForm("tagged", opening, "", closing, following, tag, closing.strip())
    found = _object_at(body, ARGUMENTS)
    if found is None:
        return CallForm()
    middle, tail = body[: found[0]], found[1]
    closing = _until(body[tail:], end)
    after = _object_at(pieces[1], ARGUMENTS) if len(pieces) == 3 else None
    following = pieces[1][after[1] :] if after is not None else None
    form = CallForm("named", opening, middle, closing, following, tag.strip(), closing.strip())
    # Where the name lies in JSON, so does the call: its tag ends where that begins.
    for begin in (index for index, character in enumerate(tag) if character in "{["):
        try:
            _, length = json.JSONDecoder().raw_decode(written[at - len(tag) + begin :])
        except ValueError:
            continue
        past = length - (len(tag) - begin) - len(NAME) - tail
        return replace(form, kind="json", tag=tag[:begin].strip(), end_tag=closing[past:].strip())
    return form


def _calls(count: int, with_id: bool) -> Turn:
    call: dict[str, Any] = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
    call |= {"id": CALL_ID} if with_id else {}
    return {"role": "assistant", "content": "", "tool_calls": [call] * count}


def _end_of_turn(render: Render, tools: Tools) -> str:
    """What a template writes after an answer of plain text."""
    return render([ASKED, {"role": "assistant", "content": VALUE}], tools, False).rpartition(VALUE)[2]


def _until(text: str, end: str) -> str:
    return text.removesuffix(end).removesuffix(end.rstrip())


def _is_open(text: str, tags: tuple[str, str]) -> bool:
    return text.rfind(tags[0]) > text.rfind(tags[1])


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _object_at(text: str, value: object) -> tuple[int, int] | None:
    """Where in `text` the JSON of `value` begins and ends."""
    for match in re.finditer(r"\{", text):
        try:
            found, length = json.JSONDecoder().raw_decode(text[match.start() :])
        except ValueError:
            continue
        if found == value:
            return match.start(), match.start() + length
    return None


def without_tools(turns: Sequence[Turn], tools: Tools) -> list[dict[str, Any]]:
    """A conversation with tools for a template that reads none: told in the system message, calls and answers as text."""
    functions = [{key: value for key, value in tool["function"].items() if value} for tool in tools]
    told = "\n".join(json.dumps({"type": "function", "function": one}, ensure_ascii=False) for one in functions)
    made = [_as_text(turn) for turn in turns]
    if tools:
        words = HERMES_TOOLS.format(tools=told)
        if made and made[0]["role"] == "system":
            made[0] = {**made[0], "content": f"{made[0]['content']}\n\n{words}"}
        else:
            made.insert(0, {"role": "system", "content": words})
    joined: list[dict[str, Any]] = []
    for turn in made:
        # The answers of several calls are one turn of the user's.
        if joined and turn.pop("of_a_tool", False) and joined[-1].pop("of_tools", False):
            joined[-1]["content"] += "\n" + turn["content"]
            joined[-1]["of_tools"] = True
        else:
            joined.append(turn)
    return [{key: value for key, value in turn.items() if key != "of_tools"} for turn in joined]


def _as_text(turn: Turn) -> dict[str, Any]:
    if turn["role"] == "tool":
        content = f"<tool_response>\n{turn['content']}\n</tool_response>"
        return {"role": "user", "content": content, "of_a_tool": True, "of_tools": True}
    calls = [
        HERMES.opening + call["function"]["name"] + HERMES.middle
        + json.dumps(call["function"]["arguments"], ensure_ascii=False) + HERMES.closing
        for call in turn.get("tool_calls") or ()
    ]  # fmt: skip
    told = {key: value for key, value in turn.items() if key != "tool_calls"}
    return told | {"content": "\n".join(filter(None, [turn.get("content") or "", *calls]))}
