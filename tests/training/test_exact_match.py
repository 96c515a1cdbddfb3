"""Exact match: answers are compared word for word, in order, in batches."""

from typing import Any

import pytest

from adapterhub_lite.errors import DataError
from adapterhub_lite.training import evaluate_exact_match

ROWS = [
    {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": str(i * i)}]} for i in range(5)
]


def square(chats: list[Any]) -> list[str]:
    assert all(turns[-1]["role"] == "user" for turns in chats)
    return [f" {int(turns[-1]['content']) ** 2}\n" for turns in chats]


def test_right_answers_are_counted_whatever_the_batch() -> None:
    for size in (1, 2, 5, 16):
        result = evaluate_exact_match(square, ROWS, batch_rows=size)
        assert (result.correct, result.total, result.share, result.examples) == (5, 5, 1.0, ())


def test_wrong_answers_are_shown() -> None:
    result = evaluate_exact_match(lambda chats: ["9"] * len(chats), ROWS)
    assert (result.correct, result.total, len(result.examples)) == (1, 5, 3)
    assert (result.examples[1].prompt, result.examples[1].wanted, result.examples[1].found) == ("1", "1", "9")


def test_prompt_and_completion_are_understood() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "3", "completion": "9"},
        {"prompt": [{"role": "user", "content": "2"}], "completion": [{"role": "assistant", "content": "4"}]},
    ]
    assert evaluate_exact_match(square, rows).correct == 2


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="end with an assistant turn"):
        evaluate_exact_match(square, [{"messages": [{"role": "user", "content": "1"}]}])
    with pytest.raises(DataError, match="5 chats and returned 1 answers"):
        evaluate_exact_match(lambda _: ["1"], ROWS)
    with pytest.raises(DataError, match="no rows"):
        evaluate_exact_match(square, [])
    with pytest.raises(DataError, match="found 'text'"):
        evaluate_exact_match(square, [{"text": "a"}])
