"""Calls in every family's form: what a template writes is read back, whole and in whatever pieces it comes."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_template_utils import render_jinja_template

from adapterhub_lite.bases.chat.answer_reader import AnswerReader, ReadCall, joined, read_answer
from adapterhub_lite.bases.chat.call_form import ASKED, AnswerForm, Render, answer_form, without_tools
from tests.bases.call_templates import HERMES, LLAMA, PLAIN, PYTHONIC, READABLE, THINKING

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "count": {"type": "integer"}}},
        },
    }
    for name in ("look.up", "send-it")
]
ENDS = ("\n", "<|im_end|>", "<|eot_id|>", "</s>", "<|call|>")


def renderer(template: str) -> Render:
    def render(turns: Sequence[Any], tools: Sequence[Any], ask: bool) -> str:
        try:
            texts, _ = render_jinja_template(
                [list(turns)], tools=list(tools) or None, chat_template=template, add_generation_prompt=ask
            )
        except Exception as error:
            raise ValueError(str(error)) from error
        return str(texts[0])

    return render


def form_of(template: str) -> AnswerForm:
    return answer_form(template, renderer(template))


def written(template: str, calls: Sequence[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """An answer with calls as the template writes it, up to its end token."""
    made = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    render = renderer(template)
    whole = render([ASKED, {"role": "assistant", "content": content, "tool_calls": made}], TOOLS, False)
    asked = render([ASKED], TOOLS, True).removesuffix("<think>\n")
    text = whole[next((i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), len(asked)) :]
    for end in ENDS:
        text = text.removesuffix(end)
    return text if template != THINKING else f"</think>\n\n{text}"


def in_pieces(form: AnswerForm, text: str, cuts: Sequence[int], tools: Sequence[Any] = TOOLS) -> Any:
    reader, pieces, start = AnswerReader(form, tools), [], 0
    for cut in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        pieces += reader.feed(text[start:cut])
        start = cut
    return joined([*pieces, *reader.finish()])


awkward = st.text('"\\{}[]a ', max_size=12)
arguments = st.fixed_dictionaries({}, optional={"text": awkward | st.text(max_size=12), "count": st.integers(-9, 99)})
tricky = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "look.up", "arguments": {', '"}', "}", "]", "[", '"', "\\", "\n", " ", "a", "é",
     "<think>", "</think>", "[TOOL_CALLS]", "look.up", "<function=look.up>", "<parameter=text>", "</function>", "<|channel|>",
     "analysis", "final", "<|message|>", "<|end|>", " to=functions.look.up", "<call>", "</call>", ", ", "[ARGS]"]
)  # fmt: skip
FORMS = {name: form_of(template) for name, template in READABLE.items()} | {"plain": form_of(PLAIN)}


@pytest.mark.parametrize("name", READABLE)
@given(calls=st.lists(st.tuples(st.sampled_from(["look.up", "send-it"]), arguments), min_size=1, max_size=3))
def test_the_calls_that_a_template_writes_are_read_back(name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    if name in ("llama", "harmony"):
        calls = calls[:1]
    for _, values in calls:
        # Tagged values are text between lines.
        if name == "coder" and "text" in values:
            values["text"] = values["text"].replace("<", "").strip()
    found = read_answer(FORMS[name], TOOLS, written(READABLE[name], calls))
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
    assert found.text == ""


@pytest.mark.parametrize("name", FORMS)
@given(text=st.lists(tricky, max_size=14).map("".join), cuts=st.lists(st.integers(0, 400), max_size=6))
def test_pieces_join_to_the_whole_however_an_answer_is_cut(name: str, text: str, cuts: list[int]) -> None:
    assert in_pieces(FORMS[name], text, cuts) == in_pieces(FORMS[name], text, range(len(text)))
    assert in_pieces(FORMS[name], text, cuts, ()) == read_answer(FORMS[name], (), text)


@given(text=st.text())
def test_an_answer_of_text_alone_is_left_as_it_is(text: str) -> None:
    assert read_answer(FORMS["plain"], (), text).text == text
    if "<" not in text:
        assert read_answer(FORMS["hermes"], TOOLS, text).text == text


@pytest.mark.parametrize("name", READABLE)
def test_a_form_writes_what_its_template_writes(name: str) -> None:
    """The texts around name and arguments, with which a call is forced."""
    call, values = FORMS[name].call, {"text": "a"}
    if call.kind == "tagged":
        pytest.skip("its arguments are written one by one")
    # These two write one call in an answer.
    assert (call.following is None) == (name in ("llama", "harmony"))
    count = 1 if call.following is None else 3
    one = "look.up" + call.middle + json.dumps(values)
    text = call.opening + one + ((call.following or "") + one) * (count - 1) + call.closing
    found = read_answer(FORMS[name], TOOLS, text)
    assert [json.loads(made.arguments) for made in found.calls] == [values] * count
    if name not in ("mistral-list", "nested"):  # they give each call an id
        assert text.removesuffix("<|call|>") == written(READABLE[name], [("look.up", values)] * count)


def test_reasoning_is_told_apart() -> None:
    assert FORMS["thinking"].in_reasoning and FORMS["hermes"].plain and not FORMS["thinking"].plain
    text = 'because\n</think>\n\nWell.\n<tool_call>\n{"name": "look.up", "arguments": {"text": "a"}}\n</tool_call>'
    found = read_answer(FORMS["thinking"], TOOLS, text)
    assert (found.reasoning, found.text, found.calls) == ("because", "Well.", (ReadCall("look.up", '{"text": "a"}'),))
    channels = (
        "<|channel|>analysis<|message|>because<|end|><|start|>assistant<|channel|>final<|message|>Well.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.look.up <|constrain|>json<|message|>{}"
    )
    found = read_answer(FORMS["harmony"], TOOLS, channels)
    assert (found.reasoning, found.text, found.calls) == ("because", "Well.", (ReadCall("look.up", "{}"),))


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        "<tool_call>nothing</tool_call>",
        '<tool_call>{"name": "look.up", "argu',
        '<tool_call>["look.up"]</tool_call>',
    ],
)
def test_what_is_no_call_of_a_tool_is_text(text: str) -> None:
    found = read_answer(FORMS["hermes"], TOOLS, text)
    assert found.calls == () and found.text == text
    assert read_answer(form_of(LLAMA), TOOLS, '{"name": "Ada", "age": 3}').text == '{"name": "Ada", "age": 3}'


def test_an_answer_that_was_cut_off_keeps_what_it_has() -> None:
    found = read_answer(FORMS["hermes"], TOOLS, '<tool_call>\n{"name": "look.up", "arguments": {"text": "a')
    assert found.calls == (ReadCall("look.up", '{"text": "a'),)


def test_the_familys_own_description_goes_first() -> None:
    template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<why>", "close": "</why>", "content": "text"},
            "tool_calls": {
                "open": "<do>", "close": "</do>", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }  # fmt: skip
    text = '<why>since</why>Well.<do>{"name": "look.up", "arguments": {"text": "a", "count": 2}}</do>'
    form = answer_form(HERMES, renderer(HERMES), template)
    truth = parse_response(text, template, prefix="", tools=TOOLS)
    found = read_answer(form, TOOLS, text)
    assert (found.reasoning, found.text) == (truth["thinking"], truth["content"])
    (call,) = truth["tool_calls"]
    assert found.calls == (ReadCall(call["function"]["name"], json.dumps(call["function"]["arguments"])),)
    assert in_pieces(form, text, range(len(text))) == found
    assert read_answer(form, TOOLS, "<do>{nothing").text == "<do>{nothing"
    named = {"open_pattern": r"<do:(?P<name>[\w.]+)>", "close": "</do>", "repeats": True, "content": "json",
             "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}}  # fmt: skip
    form = answer_form(
        HERMES, renderer(HERMES), {**template, "fields": {"tool_calls": named, "content": {"content": "text"}}}
    )
    assert read_answer(form, TOOLS, 'a<do:look.up>{"text": "b"}</do>').calls == (ReadCall("look.up", '{"text": "b"}'),)
    assert read_answer(form, TOOLS, "a<do:look.up>{b").calls == (ReadCall("look.up", "{b"),), "broken JSON is no error"


def test_a_form_that_is_not_known_says_so() -> None:
    assert form_of(PYTHONIC).call.kind == "unknown"
    assert not form_of(PLAIN).reads_tools and form_of(PLAIN).plain


def test_a_template_without_tools_is_told_of_them_in_words() -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "look.up", "arguments": {"text": "x"}}}]},
        {"role": "tool", "tool_call_id": "a", "name": "look.up", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "name": "look.up", "content": "2"},
    ]  # fmt: skip
    told = without_tools(turns, TOOLS)
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert all(json.dumps(tool["function"]["parameters"]) in told[0]["content"] for tool in TOOLS)
    assert told[2]["content"] == '<tool_call>\n{"name": "look.up", "arguments": {"text": "x"}}\n</tool_call>'
    assert told[3]["content"] == "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    assert all(set(turn) <= {"role", "content"} for turn in told)
