"""Answers as what they are: every character of the model stays text, and the markup is our own."""

import html
import json
import re

from hypothesis import given
from hypothesis import strategies as st

from adapterhub_app.display.kinds import FOLDED_DEPTH, call_card, show_answer, token_strip
from adapterhub_app.display.transcript import Turn, chat_bubbles, read_turns, write_turns

OURS = re.compile(r'</?(?:b|i|u|span|details|summary)(?: class="[a-z -]+(?:\d)?"| open)?>')


def text_of(page: str) -> str:
    """The characters that a page shows."""
    return html.unescape(OURS.sub("", page))


@given(st.text(max_size=200))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    answer = show_answer(text)
    assert "<" not in OURS.sub("", answer.html)
    if answer.kind in ("text", "SQL") and not answer.reasoning and not re.match(r"\s*<(think|reasoning)", text):
        assert text_of(answer.html) == text


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=8))
def test_json_is_laid_out_and_stays_the_same_value(value: object) -> None:
    answer = show_answer(json.dumps({"<b>": value}))
    assert answer.kind == "JSON" and json.loads(text_of(answer.html)) == {"<b>": value}


@given(st.recursive(st.none() | st.text(max_size=4), lambda v: st.lists(v) | st.dictionaries(st.text(max_size=4), v)))
def test_json_has_the_lines_of_json_laid_out(value: object) -> None:
    """As a page shows it: a block begins and ends a line, whatever is folded."""
    page = re.sub(r"<details open>|</details>|</summary>", "\n", show_answer(json.dumps([value])).html)
    lines = [line for line in text_of(page).split("\n") if line]
    assert lines == json.dumps([value], ensure_ascii=False, indent=2).split("\n")


def test_every_object_within_the_depth_is_one_fold() -> None:
    page = show_answer(json.dumps([[[[[["deep"]]]]], {"a": {}, "b": {"c": 1}}])).html
    assert page.count("<details open>") == page.count("</details>") == FOLDED_DEPTH + 2
    assert show_answer("[" * 3000 + "]" * 3000).kind in ("JSON", "text")


def test_sql_words_are_marked_and_its_text_is_kept() -> None:
    text = "SELECT name FROM film WHERE year > 1999 AND title = 'A<B' LIMIT 3"
    answer = show_answer(text)
    assert answer.kind == "SQL" and text_of(answer.html) == text
    assert (
        "<b>SELECT</b>" in answer.html and "<u>1999</u>" in answer.html and "<i>&#x27;A&lt;B&#x27;</i>" in answer.html
    )
    assert show_answer("Selecting a film is easy").kind == "text"


def test_reasoning_is_folded_and_calls_are_cards() -> None:
    text = '<think>7 < 8\nso</think>\n<tool_call>{"name": "find", "arguments": {"q": "<b>"}}</tool_call>'
    answer = show_answer(text)
    assert answer.reasoning == "7 < 8\nso" and answer.calls == (("find", '{\n  "q": "<b>"\n}'),) and answer.html == ""
    turn = Turn(role="assistant", text=text, by="sql", notice="stopped", tokens=(("a<", 0.5), ("b", 0.99)))
    titles = [bubble["metadata"]["title"] if "metadata" in bubble else "" for bubble in chat_bubbles([turn], {})]
    assert titles[0] == "Reasoning" and titles[1] == "" and "sql" in titles[2] and titles[3].startswith("How probable")
    assert "calls <x>" in text_of(call_card("<x>", "{}"))
    assert read_turns(write_turns([turn])) == [turn]
    broken = '<tool_call>{"name": 3</tool_call> <tool_call>["x"]</tool_call>'
    assert show_answer(broken).calls == () and text_of(show_answer(broken).html) == broken


def test_doubtful_tokens_say_how_probable_they_were() -> None:
    page = token_strip((("<a>", 0.02), (" b", 0.999)))
    assert "2 %" in page and text_of(page) == "<a>2 % b" and 'class="sure-0"' in page and 'class="sure-4"' in page
