"""Training rows: from a JSONL or parquet file, a Hub data set or a list to one table, checked row by row.

Knows the three shapes a row may have and where each row came from; knows no tokenizer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from adapterhub_lite.errors import DataError

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
WANTED = "`messages`, or `prompt` and `completion`, or `text`"
# The column that remembers `file:line` through every shuffle and selection, for errors raised later.
SOURCE_COLUMN = "source"


def load_rows(source: str | Path | Dataset | Iterable[Mapping[str, Any]], *, split: str = "train") -> Dataset:
    """Return the rows of `source` as one table, each row checked; nothing is written to disk for a file.

    `source` is the path of a JSONL or parquet file, a Hub data set id (its `split` is taken), a `Dataset` or any iterable of
    mappings. All rows have one shape: `messages` (a list of `{"role", "content"}` with an assistant turn),
    `prompt` and `completion`, or `text`. The result has these columns and `source` (where the row came from).

    Raises:
        DataError: no such file, a line that is not JSON, or a row of the wrong shape; names file and line.
    """
    if isinstance(source, Dataset):
        return _as_table(((f"row {i}", row) for i, row in enumerate(source)), "the data set")
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
            return _as_table(read(path), str(path))
        if path.suffix or isinstance(source, Path) or str(source).count("/") > 1:
            raise DataError(f"There is no file {path}. Give a JSONL or parquet file, rows with {WANTED}.")
        return _from_hub(str(source), split)
    return _as_table(((f"row {i}", row) for i, row in enumerate(source)), "the list of rows")


def _from_hub(name: str, split: str) -> Dataset:
    try:
        table = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name!r} is no file here, and as a data set (split {split!r}) it could not be loaded: {error} "
            "Check the spelling and the network, or give a JSONL file."
        ) from error
    if isinstance(table, IterableDataset):
        raise DataError(f"{name!r} is streamed; pass it to the trainer's train_dataset after tokenising it yourself.")
    return _as_table(((f"{name}[{split}] row {i}", row) for i, row in enumerate(table)), name)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 JSONL.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: wanted one JSON object, found {_short(line)} ({error.msg}). "
                "Write one whole JSON object a line (JSONL)."
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path}, row {number}", row
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}.") from error


def _as_table(rows: Iterable[tuple[str, Any]], name: str) -> Dataset:
    columns: dict[str, list[Any]] = {}
    shape: str | None = None
    for where, row in rows:
        found = _shape_of(where, row)
        shape = shape or found
        if found != shape:
            raise DataError(f"{where}: wanted {shape} as in the rows before, found {found}. Split the file by shape.")
        _check(where, row, found)
        for key in SHAPES[found]:
            columns.setdefault(key, []).append(_turns(row[key]) if isinstance(row[key], list) else row[key])
        columns.setdefault(SOURCE_COLUMN, []).append(where)
    if shape is None:
        raise DataError(f"There are no rows in {name}. Give at least one, with {WANTED}.")
    return Dataset.from_dict(columns)


def _shape_of(where: str, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: wanted a JSON object with {WANTED}, found {_short(row)}.")
    for shape, keys in SHAPES.items():
        if all(key in row for key in keys):
            return shape
    found = ", ".join(repr(str(key)) for key in row) or "no keys at all"
    raise DataError(f"{where}: wanted {WANTED}, found {found}. Rename the keys.")


def _check(where: str, row: Mapping[str, Any], shape: str) -> None:
    if shape == "messages":
        _check_turns(where, row["messages"])
        if not any(turn["role"] == "assistant" for turn in row["messages"]):
            raise DataError(
                f"{where}: wanted at least one turn with role 'assistant' to learn from, found roles "
                f"{[turn['role'] for turn in row['messages']]}. Add the answer, or remove the row."
            )
        return
    for key in SHAPES[shape]:
        value = row[key]
        if shape == "prompt and completion" and isinstance(value, list):
            _check_turns(where, value)
        elif not isinstance(value, str) or not (value or key == "prompt"):
            raise DataError(f"{where}: wanted text under {key!r}, found {_short(value)}.")
    if shape == "prompt and completion" and isinstance(row["prompt"], list) != isinstance(row["completion"], list):
        raise DataError(f"{where}: wanted prompt and completion both as text or both as turns; make them alike.")


def _check_turns(where: str, turns: Any) -> None:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: wanted a list of turns with 'role' and 'content', found {_short(turns)}.")
    for turn in turns:
        good = isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        if not good:
            raise DataError(f"{where}: wanted turns with text under 'role' and 'content', found {_short(turn)}.")


def _turns(turns: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")
