"""Rows of a file as it is: what can be trained is kept as `load_rows` would read it, the rest is counted with its reason."""

from pathlib import Path

import pytest

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.usable import usable_rows

ROWS = [
    {"question": "größer?", "answer": 'ja, "sehr" 👍\n'},
    {"question": "leer?", "answer": " "},
    {"question": "", "answer": "x"},
    {"text": "of another shape"},
    {"question": "b", "answer": "c", "note": "unused"},
]


def test_bad_rows_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    found = usable_rows(ROWS)
    assert [row["messages"][0]["content"] for _, row in found.found] == ["größer?", "b"]
    assert found.left_out == 3 and len(found.reasons) == 3 and found.unused == ("note",)
    written = found.write(tmp_path / "rows.jsonl")
    kept = [{key: row[key] for key in row if key != "source"} for row in load_rows(str(written))]
    wanted = [{key: row[key] for key in row if key != "source"} for row in load_rows([ROWS[0], ROWS[4]])]
    assert kept == wanted


def test_named_columns_make_a_chat_of_the_two() -> None:
    rows = [{"frage": "a?", "antwort": "b", "x": "1"}, {"frage": "", "antwort": "b"}, {"frage": "a?"}]
    found = usable_rows(rows, ("frage", "antwort"))
    assert [row for _, row in found.found] == [
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    ]
    assert found.reasons == ("row 1: 'frage' is empty.", "row 2: there is no column 'antwort'.")
    assert found.columns == ("frage", "antwort", "x")


def test_nothing_usable_says_why() -> None:
    with pytest.raises(DataError, match="answer is empty"):
        usable_rows([ROWS[1]]).table()


def test_names_that_say_nothing_are_told_apart_from_rows_that_are_empty() -> None:
    named = [{"question": "a?", "answer": ""}]
    assert usable_rows([{"frage": "a?", "antwort": "b"}]).is_unnamed
    assert not usable_rows(named).is_unnamed and not usable_rows([]).is_unnamed
    assert not usable_rows([{"frage": "a?", "antwort": "b"}], ("frage", "antwort")).is_unnamed
