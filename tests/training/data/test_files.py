"""Any common file gives its rows as they are written; whatever is wrong in it is named with its line."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.held_out import row_digests, split_rows, without_rows_of
from adapterhub_lite.training.data.reading.shapes import Columns
from adapterhub_lite.training.data.reading.tables import TableWriter
from adapterhub_lite.training.data.rows import load_rows

PAIR = {"prompt": "é", "completion": "ü"}
SYSTEM = {"role": "system", "content": "s"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows_of(table: Dataset) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "source"} for row in table]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode() + b"\r\n"),
        ("array.json", json.dumps([PAIR, PAIR], indent=2).encode()),
        ("comma.csv", "prompt,completion\né,ü\né,ü\n".encode()),
        ("excel.csv", "\ufeffprompt;completion\r\né;ü\r\n\r\né;ü\r\n".encode()),
        ("padded.csv", "prompt,completion\r\né,ü\r\n,\r\né,ü\r\n,\r\n,\r\n".encode()),
        ("unicode.csv", "prompt\tcompletion\r\né\tü\r\né\tü\r\n".encode("utf-16")),
        ("tabs.tsv", "prompt\tcompletion\né\tü\né\tü".encode()),
    ],
)
def test_every_common_text_file_gives_its_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(load_rows(tmp_path / name)) == [PAIR, PAIR]


def test_a_cell_is_the_text_that_is_written_in_it(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text('question,answer\n"a, ""b""\nc",NA\n007,null\n1.0,None\n')
    turns = [row["messages"] for row in load_rows(path)]
    assert [(one["content"], two["content"]) for one, two in turns] == [
        ('a, "b"\nc', "NA"),
        ("007", "null"),
        ("1.0", "None"),
    ]
    assert load_rows(path)["source"] == [f"{path}, line {n}" for n in (2, 4, 5)]


def test_rows_keep_their_own_keys_though_a_table_would_give_all_to_each(tmp_path: Path) -> None:
    def call(arguments: dict[str, Any]) -> dict[str, Any]:
        turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "a"}, turn]}

    rows = [call({"city": "Oslo"}), call({"day": None, "n": 1.5})]
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert rows_of(load_rows(path)) == rows
    # A table of one column a key fills up with None, which is taken out again.
    assert rows_of(load_rows(Dataset.from_list([*rows[:1], call({"day": "now"})])))[0] == rows[0]


@pytest.mark.parametrize("kind", ["files", "saved", "saved with splits"])
def test_a_folder_is_read_by_its_split(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if kind == "files":
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(PAIR))
        (folder / "test.jsonl").write_text(json.dumps({"prompt": "t", "completion": "u"}))
    elif kind == "saved":
        Dataset.from_list([PAIR]).save_to_disk(folder)
    else:
        DatasetDict(train=Dataset.from_list([PAIR])).save_to_disk(folder)
    assert rows_of(load_rows(folder)) == [PAIR]
    if kind != "saved":
        with pytest.raises(DataError, match=r"has no split 'dev', found .*train"):
            load_rows(folder, split="dev")


def test_a_frame_and_a_function_give_rows() -> None:
    pandas = pytest.importorskip("pandas")
    assert rows_of(load_rows(pandas.DataFrame([PAIR]))) == [PAIR]
    made = load_rows([{"q": "a", "a": "b"}], formatting_func=lambda row: f"{row['q']}={row['a']}")
    assert rows_of(made) == [{"text": "a=b"}]
    with pytest.raises(DataError, match="row 0: formatting_func failed: KeyError"):
        load_rows([{"q": "a"}], formatting_func=lambda row: row["z"])


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["user", "assistant"]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["system", "user", "assistant"],
        ),
        ({"instruction": "a", "input": "", "output": "b"}, ["user", "assistant"]),
        ({"instruction": "a", "input": "c", "output": "b", "history": [["x", "y"]]}, ["user", "assistant"] * 2),
        ({"question": "a", "answer": "b"}, ["user", "assistant"]),
        ({"prompt": "a", "response": "b"}, ["user", "assistant"]),
        # LLaMA-Factory writes so that a row has no tools.
        ({"question": "a", "answer": "b", "tools": "[]"}, ["user", "assistant"]),
        (
            {"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])},
            ["user", "assistant"],
        ),
    ],
)
def test_shapes_of_others_become_turns(row: dict[str, Any], turns: list[str]) -> None:
    (made,) = rows_of(load_rows([row]))
    assert [turn["role"] for turn in made["messages"]] == turns
    assert made["messages"][-1]["content"] == "b" and made["messages"][-2]["content"].startswith("a")


def test_columns_are_named_where_their_names_say_nothing() -> None:
    rows = [{"q": "a", "a": "b", "id": 7}]
    assert rows_of(load_rows(rows, columns=Columns("q", "a"))) == [{"prompt": "a", "completion": "b"}]
    laid_out = Columns(None, "a", "Q: {q}\n")
    assert rows_of(load_rows(rows, columns=laid_out)) == [{"prompt": "Q: a\n", "completion": "b"}]
    assert rows_of(load_rows(rows, columns=Columns(template="{q}-{a}"))) == [{"text": "a-b"}]
    with pytest.raises(DataError, match="row 0: there is no column 'z'"):
        load_rows(rows, columns=Columns("z", "a"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"messages": [{"role": "system", "content": "be nice"}]}, "role 'assistant'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "turn 2"),
        ({"prompt": "a", "completion": None}, "'completion'"),
        ({"messages": None}, "'messages'"),
        ({"text": None}, "'text'"),
        ({"prompt": 1, "completion": 2}, "'prompt'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "images": ["x"]},
            "'images'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "turn 1: content of the type 'image'",
        ),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "'narrator'"),
        ({"question": "", "answer": "b"}, "'question'"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": "f()"}]},
            "turn 1: expected a list of calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": {"name": "f"}}]},
            "expected a list of calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"tool": "f"}}]}]}, "a function's 'name'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "expected an object, or the JSON text of one, under 'arguments'",
        ),
        ({"prompt": "\ud83d", "completion": "b"}, r"'prompt' holds half a character \(\\ud83d\)"),
        ({"messages": [{"role": "assistant", "content": "\ude00"}]}, "'messages' holds half a character"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": -1}]}, "'weight' is '-1'"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_row_and_key(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"row 0.*{words}"):
        load_rows([row])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,completion\na,b,c\n", "line 2: expected 2 cells"),
        ("a.csv", 'prompt,completion\na,"b\n', "not the CSV"),
        ("a.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("a.csv", "prompt,completion\na,b\n\ufeffprompt,completion\nc,d\n", "line 3: the names of the columns stand"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"},\n', "line 1"),
        ("a.json", '[{"prompt": "a"', "not the JSON array"),
        ("a.xlsx", "x", "spreadsheet"),
        ("a.jsonl.gz", "x", "compressed"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_rows(tmp_path / name)


def test_columns_that_are_not_used_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    load_rows([{**PAIR, "id": n, "empty": ""} for n in range(3)])
    assert caplog.text.count("these columns are not used: 'id' (first in row 0)") == 1 and "empty" not in caplog.text


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": [SYSTEM, *TURNS], "system": "another"}, "'system'"),
        ({"messages": [SYSTEM, *TURNS], "system": "s"}, ""),
        ({"messages": TURNS, "system": ["s"]}, "'system'"),
        ({"messages": TURNS, "system": "s"}, ""),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "'context'"),
        ({"instruction": "a", "input": "", "context": "c", "output": "d"}, ""),
    ],
)
def test_a_column_that_another_took_the_place_of_is_named(
    row: dict[str, Any], unused: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_rows([row])
    assert ("not used" in caplog.text) == bool(unused) and unused in caplog.text


def test_several_calls_in_one_turn_of_sharegpt_are_calls() -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(calls)}]}
    (made,) = rows_of(load_rows([row]))
    assert [call["function"] for call in made["messages"][-1]["tool_calls"]] == calls


def test_dates_in_turns_are_read_as_text() -> None:
    turn = {"role": "user", "content": "a", "timestamp": datetime(2026, 1, 2, tzinfo=UTC)}
    (made,) = rows_of(load_rows([{"messages": [turn, {"role": "assistant", "content": "b"}]}]))
    assert made["messages"][0]["timestamp"].startswith("2026-01-02")


def test_a_large_table_lies_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.training.data.reading.tables.MOST_BYTES_IN_MEMORY", 1 << 12)
    rows = [{"text": f"row {n}"} for n in range(3000)]
    table = load_rows(rows)
    assert table.cache_files and table["text"] == [row["text"] for row in rows]
    assert TableWriter(table.features).finish().num_rows == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_no_text_stands_on_both_sides(seed: int) -> None:
    table = load_rows([{"text": f"text {n % 30}" + " " * (n % 2)} for n in range(100)])
    train, held = split_rows(table, 0.2, seed)
    assert len(train) + len(held) == 100 and 20 <= len(held) <= 24
    assert not set(row_digests(train)) & set(row_digests(held))
    again = split_rows(table, 0.2, seed)[1]
    assert again["source"] == held["source"] != split_rows(table, 0.2, seed + 2)[1]["source"]
    others, shared = without_rows_of(table, train)
    assert others["source"] == held["source"] and shared == len(train)
    with pytest.raises(DataError, match="No rows are left to train on"):
        split_rows(load_rows([{"text": "same"}] * 5), 0.5, seed)
