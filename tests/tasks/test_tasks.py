"""The example tasks: reproducible, splits apart, answers that mean what the question says."""

import json
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.errors import DataError, UnknownNameError
from adapterhub_lite.tasks import TASKS, get_task
from adapterhub_lite.tasks.event import twelve_hour
from adapterhub_lite.tasks.sql import TABLES


def questions(rows: list[dict[str, list[dict[str, str]]]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(name: str) -> None:
    task = TASKS[name]
    assert task.rows(50, seed=3) == task.rows(50, seed=3)
    assert task.rows(50, seed=3) != task.rows(50, seed=4)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_questions_to_try_are_held_out(name: str) -> None:
    task = TASKS[name]
    assert set(task.questions(4)) == questions(task.rows(4, split="held-out"))


@pytest.mark.parametrize("name", sorted(TASKS))
@given(seed=st.integers(0, 1000), other=st.integers(0, 1000))
def test_no_question_is_in_both_splits(name: str, seed: int, other: int) -> None:
    task = TASKS[name]
    train, held_out = task.rows(100, seed=seed), task.rows(60, seed=other, split="held-out")
    assert len(questions(train)) == 100
    assert len(questions(held_out)) == 60
    assert not questions(train) & questions(held_out)


def test_every_query_runs_on_the_tables_it_speaks_of() -> None:
    database = sqlite3.connect(":memory:")
    for table, (texts, numbers) in TABLES.items():
        database.execute(f"CREATE TABLE {table} ({', '.join([*texts, *numbers])})")
    for row in TASKS["sql"].rows(300):
        database.execute(row["messages"][1]["content"])


@given(hour=st.integers(0, 23), minute=st.integers(0, 59))
def test_twelve_hour_times_read_back_to_the_same_minute(hour: int, minute: int) -> None:
    clock, half = twelve_hour(hour, minute).split()
    said_hour, said_minute = (int(part) for part in clock.split(":"))
    assert 1 <= said_hour <= 12
    assert (said_hour % 12 + (12 if half == "pm" else 0), said_minute) == (hour, minute)


def test_every_event_is_json_with_a_day_and_a_24_hour_time() -> None:
    for row in TASKS["event"].rows(200):
        event = json.loads(row["messages"][1]["content"])
        assert list(event) == ["title", "day", "time"]
        assert event["title"] in row["messages"][0]["content"]


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'event'\?"):
        get_task("evnt")


def test_more_rows_than_there_are_questions_is_refused() -> None:
    with pytest.raises(DataError, match=r"only .* different held-out questions"):
        TASKS["sql"].rows(100_000, split="held-out")
