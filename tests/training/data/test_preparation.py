"""What the trainer is given: tables of tokens keep their masks and limits, streams are made ready as they are read."""

from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, disable_progress_bars, enable_progress_bars
from rich.progress import Progress

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data import preparation
from adapterhub_lite.training.data.preparation import Preparation, progress_of
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import IGNORED, Limits, tokenize_rows
from tests.training.data.tokenizers import make_tokenizer

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
IDS = list(range(1, 9))


def prepared(table: Any, *limits: Any) -> Any:
    return Preparation(make_tokenizer("bytes"), Limits(*(limits or (64,)))).rows(table)


@pytest.mark.parametrize("name", ["assistant_masks", "completion_mask"])
def test_a_mask_of_somebody_elses_making_is_the_mask(name: str) -> None:
    found = prepared(Dataset.from_list([{"input_ids": IDS, name: [0] * 5 + [1] * 3}])).table
    assert found[0]["labels"] == [IGNORED] * 5 + IDS[5:]


@pytest.mark.parametrize(
    ("overlong", "ids"), [("truncate", IDS[:6]), ("truncate_start", IDS[2:]), ("drop", None), ("refuse", None)]
)
def test_tokens_that_are_too_many_are_cut_as_rows_are(overlong: Any, ids: list[int] | None) -> None:
    table = Dataset.from_list([{"input_ids": IDS}, {"input_ids": IDS[:3]}])
    if overlong == "refuse":
        with pytest.raises(DataError, match="row 0: expected at most 6 tokens, found 8"):
            prepared(table, 6, overlong)
        return
    found = prepared(table, 6, overlong)
    assert found.table["input_ids"] == ([ids] if ids else []) + [IDS[:3]]
    assert (found.truncated, found.dropped) == (int(overlong != "drop"), int(overlong == "drop"))


def test_a_cut_at_the_start_keeps_what_every_text_begins_with() -> None:
    tokenizer = make_tokenizer("bytes", around="<s> $A")
    rows = load_rows([{"prompt": "a long question:", "completion": "yes"}])
    found = tokenize_rows(rows, tokenizer, max_length=6, overlong="truncate_start").table[0]
    assert tokenizer.decode(found["input_ids"]) == "<s>:yes</s>"
    with pytest.raises(DataError, match="no token is left to learn"):
        tokenize_rows(rows, tokenizer, max_length=6, overlong="truncate")
    more = load_rows([{"prompt": "a long question:", "completion": "yes"}, {"prompt": "a", "completion": "b"}])
    kept = tokenize_rows(more, tokenizer, max_length=6, overlong="truncate", unlearnable="drop")
    assert (len(kept.table), kept.truncated, kept.dropped) == (1, 0, 1)


def test_a_stream_of_rows_gives_what_the_table_of_them_gives() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        for number in range(70):
            yield {**ROW, "id": number} if number else ROW

    found = list(prepared(IterableDataset.from_generator(stream)).table)
    wanted = prepared([ROW]).table[0]
    assert len(found) == 70
    assert all(row["input_ids"] == wanted["input_ids"] and row["labels"] == wanted["labels"] for row in found)


def test_a_bad_row_of_a_stream_is_named() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield ROW
        yield {"messages": [{"role": "user", "content": "a"}]}

    with pytest.raises(DataError, match=r"row 1 of the stream: .*role 'assistant'"):
        list(prepared(IterableDataset.from_generator(stream)).table)


def test_a_table_of_the_users_with_a_column_called_source_is_still_rows() -> None:
    found = prepared(Dataset.from_list([{"text": "a", "source": "here"}])).table
    assert found.num_rows == 1


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="holds no rows"):
        prepared(IterableDataset.from_generator(lambda: iter(())))


def test_progress_is_shown_of_many_rows_and_counts_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress_of(preparation.MANY_ROWS - 1) as shown:
        assert shown is None
    seen: list[float] = []
    monkeypatch.setattr(Progress, "update", lambda self, task, *, completed: seen.append(completed))
    with progress_of(preparation.MANY_ROWS) as shown:
        assert shown is not None
        for done in (1_000, preparation.MANY_ROWS):
            shown(done)
    assert seen == [1_000, preparation.MANY_ROWS]
    disable_progress_bars()
    try:
        with progress_of(preparation.MANY_ROWS) as shown:
            assert shown is None
    finally:
        enable_progress_bars()
