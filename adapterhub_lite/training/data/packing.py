"""Tokenised rows laid into longer ones, so that every row of a batch is about as long as it may be.

Sequences stay apart: `position_ids` begin at 0 with each of them, which collators and attention go by.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training.data.reading.tables import Dataset, Features, IterableDataset, List, TableWriter, Value
from adapterhub_lite.training.data.tokenization import COLUMNS, IGNORED, WEIGHTS, WEIGHTS_COLUMN

POSITIONS = {"position_ids": List(Value("int32"))}
ROWS_AT_A_TIME = 1000
Row = Mapping[str, Sequence[Any]]  # columns of one row, each with a value per token
Piece = tuple[int, int, int]  # which row, from which token, to which


def pack(table: Any, how: str, most: int) -> Any:
    """A tokenised table, or a stream of tokenised rows, packed into rows of at most `most` tokens.

    "bfd" puts each row whole where it leaves the least room (best fit, longest first); "bfd_split" does so too, and cuts a
    row that is longer; "wrapped" lays all rows end to end and cuts. A stream is packed a thousand rows at a time.

    Raises:
        ConfigurationError: these are no rows that can be read, or they are packed already.
        DataError: a row is longer than `most`, and "bfd" keeps rows whole.
    """
    names = getattr(table, "column_names", None) or ()
    if not isinstance(table, Dataset | IterableDataset) or (names and "input_ids" not in names):
        raise ConfigurationError(
            "packing reads rows of tokens or of text, and this data set gives its own: pack it yourself."
        )
    if {"position_ids", "seq_lengths"} & set(names):
        raise ConfigurationError("These rows are packed already: leave out packing.")
    if isinstance(table, IterableDataset):
        return table.map(
            lambda batch: columns_of(packed(rows_of(batch), how, most), WEIGHTS_COLUMN in batch),
            batched=True,
            batch_size=ROWS_AT_A_TIME,
            remove_columns=table.column_names,
        )
    weighted = WEIGHTS_COLUMN in names
    writer = TableWriter(Features({**COLUMNS, **POSITIONS, **(WEIGHTS if weighted else {})}))
    found: list[dict[str, list[Any]]] = []
    read = table.select_columns([name for name in ("input_ids", "labels", WEIGHTS_COLUMN) if name in names])
    rows: Any = wrapped(_each(read), most) if how == "wrapped" else best_fit(read, most, split=how == "bfd_split")
    for row in rows:
        found.append(row)
        if len(found) == ROWS_AT_A_TIME:
            writer.write(columns_of(found, weighted))
            found = []
    if found:
        writer.write(columns_of(found, weighted))
    return writer.finish()


def _each(table: Dataset) -> Iterator[Row]:
    for batch in table.iter(batch_size=ROWS_AT_A_TIME):
        yield from rows_of(batch)


def rows_of(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["input_ids"]))]


def columns_of(rows: Sequence[Mapping[str, list[Any]]], weighted: bool) -> dict[str, list[Any]]:
    """The columns of packed rows."""
    names = ["input_ids", "labels", "position_ids", *([WEIGHTS_COLUMN] if weighted else [])]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in names}
    return {**columns, "length": [len(row["input_ids"]) for row in rows]}


def packed(rows: Sequence[Row], how: str, most: int) -> list[dict[str, list[Any]]]:
    """Rows in memory, packed."""
    if how == "wrapped":
        return list(wrapped(iter(rows), most))
    parts = pieces([len(row["input_ids"]) for row in rows], most, split=how == "bfd_split")
    grouped = ([parts[i] for i in group] for group in groups([end - start for _, start, end in parts], most))
    made = [together([(rows[row], start, end) for row, start, end in group]) for group in grouped]
    return [row for row in made if how == "bfd" or teaches(row)]


def best_fit(table: Dataset, most: int, *, split: bool) -> Iterator[dict[str, list[Any]]]:
    """The rows of a table packed by best fit, each whole, or with `split` those that are longer than `most` in pieces.

    What is packed of pieces alone of which nothing would be learned is left out.
    """
    lengths = [len(ids) for batch in table.iter(batch_size=ROWS_AT_A_TIME) for ids in batch["input_ids"]]
    parts = pieces(lengths, most, split=split)
    for group in groups([end - start for _, start, end in parts], most):
        rows = rows_of(table[[parts[index][0] for index in group]])
        made = together([(row, *parts[index][1:]) for row, index in zip(rows, group, strict=True)])
        if not split or teaches(made):
            yield made


def pieces(lengths: Sequence[int], most: int, *, split: bool) -> list[Piece]:
    """Rows whole, or with `split` in pieces of at most `most` tokens."""
    if not split:
        return [(row, 0, length) for row, length in enumerate(lengths)]
    return [
        (row, start, min(length, start + most))
        for row, length in enumerate(lengths)
        for start in range(0, length, most)
    ]


def groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which rows share a packed one: longest first, each where it leaves the least room (best-fit decreasing).

    Raises:
        DataError: one is longer than `most`.
    """
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > most:
            raise DataError(f"A row has {length} tokens and cannot be packed whole into {most}. Raise max_length.")
        place = bisect_left(room, (length, -1))
        left, group = room.pop(place) if place < len(room) else (most, len(found))
        if group == len(found):
            found.append([])
        found[group].append(index)
        if left > length:
            insort(room, (left - length, group))
    return found


def together(parts: Sequence[tuple[Row, int, int]]) -> dict[str, list[Any]]:
    """Rows from a token to another, end to end; each is a sequence of its own."""
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": [], WEIGHTS_COLUMN: []}
    for part in parts:
        _append(made, *part)
    return made


def wrapped(rows: Iterator[Row], most: int) -> Iterator[dict[str, list[Any]]]:
    """All rows end to end, cut into rows of `most` tokens; a piece of a row is a sequence of its own.

    A row of which no token would be learned is left out.
    """
    made = together([])
    for row in rows:
        start, count = 0, len(row["input_ids"])
        while start < count:
            end = min(count, start + most - len(made["input_ids"]))
            _append(made, row, start, end)
            start = end
            if len(made["input_ids"]) == most:
                if teaches(made):
                    yield made
                made = together([])
    if teaches(made):
        yield made


def teaches(row: Row) -> bool:
    """Whether a packed row has a label that another token of its sequence predicts."""
    return any(label != IGNORED and place for label, place in zip(row["labels"], row["position_ids"], strict=True))


def _append(made: dict[str, list[Any]], row: Row, start: int, end: int) -> None:
    made["input_ids"].extend(row["input_ids"][start:end])
    made["labels"].extend((row["labels"] if row.get("labels") is not None else row["input_ids"])[start:end])
    made["position_ids"].extend(range(end - start))
    weights = row.get(WEIGHTS_COLUMN)
    made[WEIGHTS_COLUMN].extend(weights[start:end] if weights is not None else [1.0] * (end - start))
