"""Comparing: several tasks answer one prompt in one batch, each for itself, and the differences are exact."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st

from adapterhub_app.display.answers import STOPPED, AnswerSettings
from adapterhub_app.tabs.compare import MOST_ADAPTERS, compare, diff_words, draw_diff, live_key, nearest
from adapterhub_lite.serving import GenerationRequest
from tests.app.world import World, in_the_engine, until
from tests.step_gate import StepGate

SHORT = AnswerSettings(max_new_tokens=12)


def test_base_and_adapters_answer_as_each_would_alone(world: World) -> None:
    backend = world.backend()
    answers = list(compare(backend, "s", "hello", ["sql:1", "event"], SHORT))[-1]
    messages = [{"role": "user", "content": "hello"}]
    for answer, adapter in zip(answers, (None, "sql:1", "event"), strict=True):
        alone = world.engine.generate(GenerationRequest(messages=messages, adapter=adapter, max_new_tokens=12))
        assert answer.text == alone.text
        assert answer.receipt is not None
        assert answer.receipt.digests == ((alone.adapter_digest,) if alone.adapter_digest else ())


def test_the_answers_grow_together(world: World, gate: StepGate) -> None:
    growing = compare(world.backend(), "s", "hello", ["sql", "event"], AnswerSettings(max_new_tokens=440))
    snapshot = next(growing)
    until(lambda: in_the_engine(world.engine) == 3)
    gate.allow(30)  # with the 20 of the gate no more than 50 steps: no answer of 440 tokens ends in them
    while not all(answer.text for answer in snapshot):
        snapshot = next(growing)
    assert not any(answer.is_complete for answer in snapshot)
    gate.allow(10_000)
    assert all(answer.is_complete for answer in list(growing)[-1])


def test_one_that_cannot_answer_says_so_in_its_place(world: World) -> None:
    base, missing, malformed, event = list(compare(world.backend(), "s", "hi", ["nobody", "a b", "event"], SHORT))[-1]
    assert base.receipt is not None and event.receipt is not None
    assert missing.notice is not None and "nobody" in missing.notice
    assert malformed.notice is not None and "Wanted an adapter" in malformed.notice


def test_no_more_than_the_columns_there_are(world: World) -> None:
    answers = list(compare(world.backend(), "s", "hi", ["sql"] * 9, AnswerSettings(max_new_tokens=2)))[-1]
    assert len(answers) == MOST_ADAPTERS + 1


def test_stop_ends_the_comparison_and_leaves_the_chat(world: World, gate: StepGate) -> None:
    backend = world.backend()
    growing = compare(backend, "me", "hello", ["sql"], AnswerSettings(max_new_tokens=300))
    next(growing)
    assert backend.live.stop("me") == 0
    backend.live.stop_all("me")
    gate.allow(300)
    assert [answer.notice for answer in list(growing)[-1]] == [STOPPED, STOPPED]
    assert backend.live.stop(live_key("me")) == 0


words = st.text(alphabet="ab <\n.", max_size=30)


@given(words, words)
def test_a_diff_holds_both_texts_and_nothing_else(reference: str, other: str) -> None:
    pieces = diff_words(reference, other)
    assert "".join(text for text, kind in pieces if kind != "added") == reference
    assert "".join(text for text, kind in pieces if kind != "removed") == other


@given(words, words)
def test_a_drawn_diff_shows_the_texts_and_has_no_markup_of_theirs(reference: str, other: str) -> None:
    drawn = draw_diff(["base", "<b>"], [reference, other])
    tags = set(re.findall(r"<(/?\w+)", drawn))
    assert tags <= {"p", "/p", "div", "/div", "ins", "/ins", "del", "/del", "span", "/span"}
    if "diff-text" in drawn:
        inner = drawn.partition('<div class="diff-text">')[2].removesuffix("</div>")
        kept = re.sub(r"<del>.*?</del>", "", inner, flags=re.DOTALL)
        assert html.unescape(re.sub(r"</?(ins|span)>", "", kept)) == other


def test_an_answer_is_marked_against_the_base_or_the_likest_before_it_or_nothing() -> None:
    base, sql, other = "1. John Smith", "SELECT * FROM staff LIMIT 6;", "SELECT * FROM staff LIMIT 7;"
    assert nearest([base], sql) is None
    assert nearest([base, sql], other) == 1
    assert nearest([sql, base], other) == 0
    assert nearest([base, "SELECT * FROM shops;", sql], other) == 2
    assert "The same answer as sql" in draw_diff(["base", "sql", "two"], [base, sql, sql])
    assert "<del>6;</del><ins>7;</ins>" in draw_diff(["base", "sql", "two"], [base, sql, other])
    assert "<script" not in draw_diff(["<script>", "two"], ["a <script>1 b c", "a <script>2 b c"])


def test_leaving_the_page_cancels_the_comparison(world: World, gate: StepGate) -> None:
    backend = world.backend()
    growing = compare(backend, "gone", "hello", ["sql"], AnswerSettings(max_new_tokens=400))
    next(growing)
    under_way = list(backend.live._by_session[live_key("gone")])
    growing.close()
    assert under_way and all(answer.is_cancelled for answer in under_way)
