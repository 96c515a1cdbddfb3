"""Training rows: from whatever holds them to one table in one of three shapes, checked row by row. Knows no tokenizer."""

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import DataError
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.training.data.reading.files import Found, read_hub, read_path, read_table
from adapterhub_lite.training.data.reading.shapes import CHAT_KEYS, WANTED, Columns, as_json, normalized
from adapterhub_lite.training.data.reading.tables import (
    DATASETS,
    Dataset,
    Features,
    IterableDataset,
    Json,
    TableWriter,
    Value,
)
from adapterhub_lite.training.settings import RowSettings

logger = logging.getLogger(__name__)
# The column that remembers `file:line` through every shuffle and selection, for errors raised later.
SOURCE_COLUMN = "source"
# What tells a table of checked rows from one of the user's own.
DESCRIPTION = "rows checked by adapterhub_lite"
SHAPES = (("messages",), ("prompt", "completion"), ("text",))
ROWS_AT_A_TIME = 1000
Formatting = Callable[[Mapping[str, Any]], Any]  # a function of the user's: a row of theirs -> a row, or its text


def load_rows(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Columns | None = None,
    formatting_func: Formatting | None = None,
) -> Dataset:
    """Return the rows of `source` as one table, each row checked; memory stays that of a batch.

    `source` is the path of a JSONL, JSON, CSV, TSV or parquet file, a folder of such files, a data set's id on the Hub
    (its `config` and `split` are taken), a `datasets` table, a pandas frame, or any iterable of mappings. All rows have
    one shape; those of others (ShareGPT, Alpaca, question and answer) become `messages`. `columns` names columns where
    the names do not say it; `formatting_func` makes a row, or its text, of each row of your own.

    The result has the columns `messages`, or `prompt` and `completion`, or `text`; `tools`, `documents` and
    `chat_template_kwargs` where a row has them; and `source` (where the row came from).

    Raises:
        DataError: no such file, a line that cannot be read, or a row that cannot be used; names file, line and key.
    """
    found, name = find_rows(source, split, config)
    return as_table(formatted(found, formatting_func), name, columns or Columns())


def columns_of(settings: RowSettings) -> Columns:
    """What the settings of a command say of a table's columns."""
    return Columns(
        settings.prompt_column or None,
        settings.completion_column or None,
        settings.template.replace("\\n", "\n") or None,
        settings.ignored(),
    )


def find_rows(source: Any, split: str, config: str | None) -> tuple[Found, str]:
    """The rows of a source, each with where it stands, and what the source is called."""
    if isinstance(source, Dataset | IterableDataset):
        return read_table(source), "the data set"
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.exists():
            return read_path(path, split), str(path)
        if path.suffix or isinstance(source, Path) or str(source).count("/") > 1:
            raise DataError(f"There is no file {path}. Give a JSONL, CSV or parquet file with {WANTED}.")
        return read_hub(str(source), config, split), str(source)
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        if DATASETS is None:
            raise missing_extra("Reading a data frame", "train")
        return read_table(Dataset.from_pandas(source, preserve_index=False)), "the data frame"
    return ((f"row {i}", row) for i, row in enumerate(source)), "the list of rows"


def formatted(found: Found, function: Formatting | None) -> Found:
    """The rows that a function of the user's makes of theirs."""
    for where, row in found:
        if function is None:
            yield where, row
            continue
        try:
            made = function(row)
        except Exception as error:  # a function of the user's may raise anything
            raise DataError(f"{where}: formatting_func failed: {type(error).__name__}: {error}.") from error
        yield where, {"text": made} if isinstance(made, str) else made


def as_table(rows: Found, name: str, columns: Columns) -> Dataset:
    """Check rows and write them to one table, a batch at a time."""
    unused: dict[str, str] = {}
    made = same_shape(rows, columns, unused)
    first = next(made, None)
    if first is None:
        raise DataError(f"There are no rows in {name}. Give at least one, with {WANTED}.")
    keys = [*shape_of(first[1]), *(CHAT_KEYS if not isinstance(first[1].get("text"), str) else ())]
    in_json = {key for key in keys if key in CHAT_KEYS or not isinstance(first[1][key], str)}
    features = {key: Json() if key in in_json else Value("string") for key in keys} | {SOURCE_COLUMN: Value("string")}
    writer, seen = TableWriter(Features(features), DESCRIPTION), set(first[1])
    rest = chain([first], made)
    while batch := list(islice(rest, ROWS_AT_A_TIME)):
        seen.update(*(row for _, row in batch))
        values = {key: [_text(row.get(key)) if key in in_json else row[key] for _, row in batch] for key in keys}
        writer.write({**values, SOURCE_COLUMN: [where for where, _ in batch]})
    if unused:
        listed = "; ".join(f"{key!r} (first in {where})" for key, where in sorted(unused.items())[:10])
        logger.warning(f"Of the rows in {name} these columns are not used: {listed}.")
    return writer.finish().remove_columns([key for key in keys if key not in seen])


def _text(value: Any) -> str | None:
    return None if value is None else as_json(value)


def same_shape(rows: Found, columns: Columns, unused: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows, normalized, all of one shape; keys that are not used go to `unused`."""
    first: tuple[tuple[str, ...], list[type]] | None = None
    for where, row in rows:
        made, extra = normalized(where, row, columns)
        for key in extra:
            unused.setdefault(key, where)
        shape = shape_of(made)
        kinds = [type(made[key]) for key in shape]
        first = first or (shape, kinds)
        if (shape, kinds) != first:
            raise DataError(
                f"{where}: expected {' and '.join(first[0])} as in the rows before, found {' and '.join(shape)}"
                f"{' of another kind (text or turns)' if shape == first[0] else ''}. Split the file by shape."
            )
        yield where, made


def is_checked(table: Dataset) -> bool:
    """Whether `load_rows` made this table."""
    return table.info.description == DESCRIPTION and SOURCE_COLUMN in table.column_names


def shape_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of the three shapes a normalized row has."""
    return next(keys for keys in SHAPES if keys[0] in row)
