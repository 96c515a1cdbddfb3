"""What the trainer is given: tables of tokens keep their masks and limits, streams are made ready as they are read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, disable_progress_bars, enable_progress_bars
from rich.progress import Progress

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data import preparation
from adapterhub_lite.training.data.preparation import Preparation, progress_of
from adapterhub_lite.training.data.reading import tables
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


def test_a_list_of_tokens_is_the_table_of_them() -> None:
    rows = [
        {"input_ids": IDS, "completion_mask": [0] * 5 + [1] * 3},
        {"input_ids": IDS[:6], "completion_mask": [1] * 6},
    ]
    for given in (rows, tuple(rows), [{key: torch.tensor(value) for key, value in row.items()} for row in rows]):
        found, table = prepared(given, 6, "truncate"), prepared(Dataset.from_list(rows), 6, "truncate")
        assert list(found.table) == list(table.table) and found.truncated == table.truncated == 1
    for wrong, words in (({"text": "a"}, "row 1: expected 'input_ids'.*'text'"), ("a", "row 1: .*found str")):
        with pytest.raises(DataError, match=words):
            prepared([rows[0], wrong])
    with pytest.raises(DataError, match="one kind of value"):
        prepared([rows[0], {"input_ids": ["a", 1]}])


class Texts(torch.utils.data.Dataset[Any]):
    """A data set of a user's own class whose rows are no tokens yet."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return {"text": "abc"[: index + 1]}


def test_rows_of_a_class_and_of_a_generator_are_rows() -> None:
    wanted = list(prepared([Texts()[index] for index in range(3)]).table)
    for given in (Texts(), (Texts()[index] for index in range(3)), map(Texts().__getitem__, range(3))):
        assert list(prepared(given).table) == wanted
    assert len(prepared(iter([{"input_ids": IDS}] * 2)).table) == 2


@pytest.mark.parametrize("given", [5, True, b"abc", {"text": ["a"]}, torch.zeros(3, 4), torch.zeros(3, 4).numpy()])
def test_what_is_no_data_set_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match=f"The rows are given as a {type(given).__name__}"):
        prepared(given)


def test_tensors_in_rows_become_lists_without_datasets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "DATASETS", None)
    made = tables.table_of([{"input_ids": torch.tensor(IDS)}, {"input_ids": IDS, "labels": IDS}])
    assert list(made) == [{"input_ids": IDS, "labels": None}, {"input_ids": IDS, "labels": IDS}]


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
