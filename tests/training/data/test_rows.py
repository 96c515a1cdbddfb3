"""Rows: the three shapes come in from a file or a list, and each mistake is one sentence with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from adapterhub_lite.errors import DataError
from adapterhub_lite.training import load_rows

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        json.loads(GOOD),
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"text": "Lots of words."},
    ],
)
def test_each_shape_is_read_from_a_file_a_list_and_a_table(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(row), "", json.dumps(row))
    from_file, from_list, from_table = load_rows(path), load_rows([row]), load_rows(Dataset.from_list([row]))
    for key, value in row.items():
        assert from_file[0][key] == from_list[0][key] == from_table[0][key] == value
    assert from_file["source"][1] == f"{path}, line 3"


def test_a_parquet_file_is_read_and_a_false_one_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([json.loads(GOOD), json.loads(GOOD)])
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet")
    assert len(rows) == 2 and rows[1]["messages"] == json.loads(GOOD)["messages"]
    assert rows["source"][1].endswith("rows.parquet, row 1")
    (tmp_path / "false.parquet").write_text(GOOD)
    with pytest.raises(DataError, match="is not a parquet file"):
        load_rows(tmp_path / "false.parquet")


def test_keys_that_training_does_not_use_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a", "id": 1}', '{"text": "b", "tags": ["x"]}')
    assert load_rows(path).column_names == ["text", "source"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "one\u2028two"}')
    assert load_rows(path)["text"] == ["one\u2028two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", ["line 2", "one JSON object", "'{not json'"]),
        ('["a", "b"]', ["line 2", "expected an object"]),
        ('{"subject": "a"}', ["line 2", "`messages`", "'subject'"]),
        ('{"messages": []}', ["line 2", "a list of turns"]),
        ('{"messages": [{"role": "user"}]}', ["line 2", "'role' and 'content'"]),
        ('{"messages": [{"role": "user", "content": "a"}]}', ["line 2", "role 'assistant'", "['user']"]),
        ('{"text": "a"}', ["line 2", "expected messages", "found text"]),
    ],
)
def test_a_bad_line_is_named_with_what_was_wanted(line: str, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "row", [{"text": 3}, {"text": ""}, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": [{}]}]
)
def test_a_bad_value_in_a_list_is_named_by_its_row(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="row 0"):
        load_rows([row])


def test_no_file_no_rows_and_wrong_encoding_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        load_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="There are no rows in"):
        load_rows(write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(tmp_path / "latin.jsonl")
