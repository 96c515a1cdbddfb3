"""Asking: the conversation grows, says who answered, and turns every fault into a sentence."""

import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from adapterhub_app.backend import PendingAnswer
from adapterhub_app.display.answers import STOPPED, AnswerSettings, form_of, grow_answer
from adapterhub_app.display.task import Task, describe_form, describe_task
from adapterhub_app.display.transcript import (
    INTERRUPTED,
    MAX_CHARACTERS,
    MAX_TURNS,
    Turn,
    chat_bubbles,
    model_messages,
    read_turns,
    write_turns,
)
from adapterhub_app.tabs.chat import ask, retry
from adapterhub_lite.serving import GenerationRequest
from tests.app.world import World
from tests.step_gate import StepGate

SHORT = AnswerSettings(max_new_tokens=12)


def status_count(world: World) -> int:
    """Requests in the engine, in rows or waiting."""
    status = world.engine.status()
    return status.running + status.waiting


def last(snapshots: Any) -> list[Turn]:
    """The conversation as it ended."""
    return list(snapshots)[-1]


def test_an_answer_grows_and_ends_with_its_receipt(world: World) -> None:
    snapshots = list(ask(world.backend(), "s", "sql@prod", "hello", [], SHORT))
    assert [turn.role for turn in snapshots[0]] == ["user", "assistant"]
    assert snapshots[0][1].is_open and snapshots[0][1].by == "sql@prod"
    texts = [turns[-1].text for turns in snapshots]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts[:-1]))
    receipt = snapshots[-1][-1].receipt
    assert receipt is not None
    assert receipt.digests == (world.registry.resolve("sql:1").digest,)
    assert receipt.base_fingerprint == world.engine.base_fingerprint


def test_changing_the_task_in_mid_conversation_changes_who_answers(world: World) -> None:
    backend = world.backend()
    turns: list[Turn] = []
    for task in ("(base)", "sql", "event"):
        turns = last(ask(backend, "s", task, "what now", turns, SHORT))
    answers = [turn for turn in turns if turn.role == "assistant"]
    assert [turn.by for turn in answers] == ["base", "sql", "event"]
    expected = [(), (world.registry.resolve("sql:2").digest,), (world.registry.resolve("event").digest,)]
    assert [turn.receipt.digests for turn in answers if turn.receipt] == expected
    assert answers[1].text != answers[2].text


def test_a_blend_answers_with_both_digests(world: World) -> None:
    answer = last(ask(world.backend(), "s", "sql*0.7+event*0.3", "hello", [], SHORT))[-1]
    assert answer.by == "0.7×sql + 0.3×event"
    assert answer.receipt is not None and len(answer.receipt.digests) == 2


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("nobody", "no such|There is no"),
        ("../etc", "Wanted an adapter"),
        ("sql*x", "not a number"),
        ("sql:9", "There is no"),
    ],
)
def test_a_task_that_is_none_is_a_sentence_in_place(world: World, task: str, expected: str) -> None:
    answer = last(ask(world.backend(), "s", task, "hello", [], SHORT))[-1]
    assert answer.receipt is None and answer.notice is not None
    assert any(words in answer.notice for words in expected.split("|"))
    assert "Traceback" not in answer.notice


def test_an_empty_question_asks_for_one(world: World) -> None:
    turns = last(ask(world.backend(), "s", "(base)", "  ", [], SHORT))
    assert len(turns) == 1 and turns[0].notice is not None and "no question" in turns[0].notice


def test_stop_ends_ones_own_answer_and_nobody_elses(world: World, gate: StepGate) -> None:
    backend = world.backend()
    mine = ask(backend, "me", "sql", "hello", [], AnswerSettings(max_new_tokens=300))
    other = ask(backend, "you", "sql", "hello", [], AnswerSettings(max_new_tokens=30))
    next(mine), next(mine)
    with ThreadPoolExecutor(1) as elsewhere:
        begun = elsewhere.submit(lambda: (next(other), next(other)))
        # By then the steps of the gate may all have gone into the first answer, which waits for more of them.
        while not begun.done() and status_count(world) < 2:
            time.sleep(0.02)
        gate.allow(20)
        begun.result(timeout=300)
    assert backend.live.stop("me") == 1
    gate.allow(300)
    assert last(mine)[-1].notice == STOPPED
    assert last(other)[-1].receipt is not None
    assert backend.live.stop("me") == 0


def test_stop_before_the_first_word_is_not_lost(world: World) -> None:
    pending = PendingAnswer()
    pending.cancel()
    messages = [{"role": "user", "content": "hello"}]
    answers = list(grow_answer(world.backend(), "s", Task(), messages, AnswerSettings(max_new_tokens=300), pending))
    assert answers[-1].notice == STOPPED


def test_closing_a_page_cancels_its_answer(world: World, gate: StepGate) -> None:
    backend = world.backend()
    growing = ask(backend, "gone", "sql", "hello", [], AnswerSettings(max_new_tokens=300))
    next(growing), next(growing)
    growing.close()
    assert backend.live.stop("gone") == 0


def test_retry_asks_the_last_question_again_of_the_task_picked_now(world: World) -> None:
    backend = world.backend()
    first = last(ask(backend, "s", "sql", "hello", [], SHORT))
    again = last(retry(backend, "s", "event", first, SHORT))
    assert [turn.role for turn in again] == ["user", "assistant"]
    assert again[0].text == "hello" and again[1].by == "event"
    assert last(retry(backend, "s", "event", [], SHORT)) == []


def test_an_answer_cut_off_by_a_restart_is_marked_and_the_conversation_goes_on(world: World) -> None:
    left = [Turn(role="user", text="hello"), Turn(role="assistant", text="", by="sql")]
    turns = last(ask(world.backend(), "s", "sql", "again", read_turns(write_turns(left)), SHORT))
    assert turns[1].notice == INTERRUPTED
    assert turns[3].receipt is not None


def test_long_conversations_and_questions_stay_within_what_a_page_may_send(world: World) -> None:
    many = [Turn(role="user", text="x"), Turn(role="assistant", text="y", notice="-")] * MAX_TURNS
    turns = last(ask(world.backend(), "s", "(base)", "z" * (MAX_CHARACTERS + 5), many, SHORT, remember=False))
    assert len(read_turns(write_turns(turns))) <= MAX_TURNS


def test_a_tasks_own_earlier_turns_go_along_and_only_when_wanted() -> None:
    def said(question: str, answer: str, by: str) -> list[Turn]:
        return [Turn(role="user", text=question), Turn(role="assistant", text=answer, by=by)]

    turns = [*said("a", "b", "sql"), *said("c", "d", "base"), *said("e", "", "sql"), Turn(role="user", text="f")]
    assert [message["content"] for message in model_messages(turns, "sql", remember=True)] == ["a", "b", "f"]
    assert [message["content"] for message in model_messages(turns, "base", remember=True)] == ["c", "d", "f"]
    assert [message["content"] for message in model_messages(turns, "sql", remember=False)] == ["f"]


@pytest.mark.parametrize(
    "sent",
    [
        [{"role": "system", "text": "x"}],
        [{"role": "user"}],
        [{"role": "user", "text": "x", "html": "y"}],
        "x",
        {"a": 1},
    ],
)
def test_what_is_no_conversation_is_refused(sent: object) -> None:
    from adapterhub_lite.errors import DataError

    with pytest.raises(DataError, match="Start a new one"):
        read_turns(sent)


def test_bubbles_show_code_as_written_and_markup_as_text() -> None:
    turns = [Turn(role="assistant", text="SELECT *\n  FROM a<b><script>", by="<b>sql</b>", notice="so")]
    answer, receipt = chat_bubbles(turns, {})
    words = answer["content"][0]["text"].replace("<b>", "").replace("</b>", "")
    assert words == '<span class="code sql">SELECT *\n  FROM a&lt;b&gt;&lt;script&gt;</span>'
    assert re.match('<strong class="task-\\d">&lt;b&gt;sql', receipt["metadata"]["title"])


def test_a_task_whose_answers_have_a_form_shows_it(world: World, make_adapter: Any) -> None:
    schema = {"properties": {"title": {"type": "string"}, "<b>": {}}}
    assert "answers" not in describe_task("event", world.registry)
    assert describe_form({"type": "object"}) == "JSON (object)"
    world.registry.add(make_adapter(seed=9), "formed", base=world.base, answer_schema=schema)
    assert describe_task("formed", world.registry).endswith("answers {title: string, <b>: any}")


def test_whether_an_answer_is_valid_is_checked_again_and_said(world: World, make_adapter: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"], "additionalProperties": False}
    world.registry.add(make_adapter(seed=10), "held", base=world.base, answer_schema=schema)
    for tokens, form, words in ((220, "whole", "valid after its schema"), (2, "cut", "cut off, so not valid")):
        answer = last(ask(world.backend(), "s", "held", "hello", [], AnswerSettings(max_new_tokens=tokens)))[-1]
        assert answer.receipt is not None and answer.receipt.form == form and words in answer.receipt.line("")
    result = world.engine.generate(GenerationRequest(prompt="x", max_new_tokens=4))
    for text, reason, form in (
        ('{"a": "b"}', "length", "whole"),
        ('{"a": "c"}', "stop", "broken"),
        ('{"a"', "length", "cut"),
    ):
        assert form_of(replace(result, text=text, finish_reason=reason), schema) == form
