"""Tables, and their types: those of `datasets`, or where it is not installed, one held in memory that does what we ask of them.

A table is written a batch at a time: in memory while it is small, in a temporary file that is mapped once it is not. So
preparing rows takes the memory of a batch, whatever their number, as `datasets` does; without its Python loop over every
value.

Everything of this package that speaks of a table takes its types from here. Without `datasets` (and pyarrow and pandas,
which it brings) rows in memory, JSONL and CSV files train as they do with it, and the same tokens come out; parquet, the
Hub's data sets, streams and data frames need it, and are refused with the command that installs it.
"""

import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, overload

import numpy as np

from adapterhub_lite.installation import missing_extra

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetDict",
    "Features",
    "IterableDataset",
    "IterableDatasetDict",
    "Json",
    "List",
    "MemoryTable",
    "TableWriter",
    "Value",
    "are_progress_bars_disabled",
    "column_batches",
    "flat_batches",
    "load_dataset",
    "load_dataset_builder",
    "load_from_disk",
    "says",
    "table_of",
]


@dataclass(frozen=True)
class PlainValue:
    """A column of plain values of a kind, such as "int32"."""

    dtype: str


@dataclass(frozen=True)
class PlainJson:
    """A column of values of any shape."""


@dataclass(frozen=True)
class PlainList:
    """A column of lists."""

    feature: PlainValue


class MemoryTable:
    """Named columns of equal length, with the methods and the meaning that a `datasets.Dataset` has."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], description: str = "") -> None:
        self._columns = dict(columns)
        self.info = SimpleNamespace(description=description)
        self.format = {"type": None}

    @classmethod
    def written(
        cls, batches: Iterable[Mapping[str, Sequence[Any]]], features: Mapping[str, Any], description: str
    ) -> "MemoryTable":
        """The table of batches of columns, in which JSON columns hold their text."""
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for batch in batches:
            for name, kind in features.items():
                values = batch[name]
                columns[name] += map(_read, values) if isinstance(kind, PlainJson) else values
        return cls(columns, description)

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, in their order."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    @overload
    def __getitem__(self, key: str) -> Sequence[Any]: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: slice | list[int]) -> dict[str, list[Any]]: ...
    def __getitem__(self, key: str | int | slice | list[int]) -> Any:
        """A column by its name, a row by its number, the columns of several rows by their numbers."""
        if isinstance(key, str):
            return self._columns[key]
        if isinstance(key, slice | list):
            rows = range(len(self))[key] if isinstance(key, slice) else key
            return {name: [values[row] for row in rows] for name, values in self._columns.items()}
        return {name: values[key] for name, values in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """The columns, `batch_size` rows at a time."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def select(self, rows: Iterable[int]) -> "MemoryTable":
        """The rows with these numbers."""
        return MemoryTable(self[list(rows)], self.info.description)

    def select_columns(self, names: Sequence[str]) -> "MemoryTable":
        """These columns alone."""
        return MemoryTable({name: self._columns[name] for name in names}, self.info.description)

    def remove_columns(self, names: Sequence[str]) -> "MemoryTable":
        """All columns but these."""
        return self.select_columns([name for name in self._columns if name not in names])

    def shuffle(self, seed: int) -> "MemoryTable":
        """The rows in an order drawn by `seed`; another one than `datasets` draws."""
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return self.select(order)


def _read(text: str | None) -> Any:
    return None if text is None else json.loads(text)


if TYPE_CHECKING or find_spec("datasets") is not None:
    from datasets import (
        Dataset,
        DatasetDict,
        Features,
        IterableDataset,
        IterableDatasetDict,
        Json,
        List,
        Value,
        are_progress_bars_disabled,
        load_dataset,
        load_dataset_builder,
        load_from_disk,
    )
    from datasets import __version__ as DATASETS  # None where it is not installed
else:
    DATASETS = None
    Dataset, Features, Json, List, Value = MemoryTable, dict, PlainJson, PlainList, PlainValue

    class _Absent:
        """A type of `datasets` that no object here can have."""

    class DatasetDict(_Absent):
        """Several tables by name."""

    class IterableDataset(_Absent):
        """A stream of rows."""

    class IterableDatasetDict(_Absent):
        """Several streams by name."""

    def are_progress_bars_disabled() -> bool:
        """Whether somebody told `datasets` to show no bars."""
        return False

    def _refuse(*_: Any, **__: Any) -> NoReturn:
        raise missing_extra("Reading a folder or a data set of the Hub", "train")

    load_dataset = load_dataset_builder = load_from_disk = _refuse

if DATASETS is not None:
    import pyarrow
    import pyarrow.compute
    from datasets import DatasetInfo
    from datasets.table import InMemoryTable

# What stays in memory; a table beyond it goes to a file.
MOST_BYTES_IN_MEMORY = 16 << 20
_folder: tempfile.TemporaryDirectory[str] | None = None


def table_of(rows: Sequence[Mapping[str, Any]]) -> "Dataset":
    """The table of rows in memory, whatever their columns; arrays and tensors become lists, what a row lacks None."""

    def listed(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else value

    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [listed(row.get(name)) for row in rows] for name in names}
    return MemoryTable(columns) if DATASETS is None else Dataset.from_dict(columns)


class TableWriter:
    """Takes batches of columns and gives a `Dataset` in the end. The temporary file goes away with the process."""

    def __init__(self, features: Features, description: str = "") -> None:
        self._features, self._description = features, description
        self._schema: Any = features.arrow_schema if DATASETS is not None else None
        self._batches: list[Any] = []  # of pyarrow, which has no types of its own; without it columns as they came
        self._bytes = 0
        self._file: Path | None = None
        self._stream: Any = None

    @property
    def names(self) -> list[str]:
        """The columns there are."""
        return list(self._features)

    def write(self, columns: "Mapping[str, Sequence[Any] | pyarrow.Array]") -> None:
        """Add rows, as equally long columns; JSON columns hold their text."""
        if DATASETS is None:
            self._batches.append(columns)
            return
        arrays = [array_of(columns[field.name], field.type) for field in self._schema]
        batch = pyarrow.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._bytes += batch.nbytes
        self._batches.append(batch)
        if self._bytes > MOST_BYTES_IN_MEMORY or self._stream is not None:
            self.spill()

    def spill(self) -> None:
        """Move what is in memory to the file."""
        global _folder
        if self._stream is None:
            _folder = _folder or tempfile.TemporaryDirectory(prefix="adapterhub-rows-", ignore_cleanup_errors=True)
            with tempfile.NamedTemporaryFile(dir=_folder.name, suffix=".arrow", delete=False) as file:
                self._file = Path(file.name)
            self._stream = pyarrow.ipc.new_stream(str(self._file), self._schema)
        for batch in self._batches:
            self._stream.write_batch(batch)
        self._batches.clear()

    def finish(self) -> Dataset:
        """Return the table of all rows."""
        if DATASETS is None:
            return MemoryTable.written(self._batches, self._features, self._description)
        info = DatasetInfo(description=self._description, features=self._features)
        if self._stream is None:
            return Dataset(InMemoryTable(pyarrow.Table.from_batches(self._batches, self._schema)), info=info)
        self._stream.close()
        return Dataset.from_file(str(self._file), info=info)


def array_of(values: "Sequence[Any] | pyarrow.Array", kind: "pyarrow.DataType") -> "pyarrow.Array":
    """Values as an Arrow array of a kind; JSON columns are given their text."""
    if isinstance(values, pyarrow.Array):
        return values.cast(kind)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(values, kind.storage_type))
    return pyarrow.array(values, kind)


def column_batches(table: Dataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """The columns of `table`, `size` rows at a time; JSON is read a column at a time, which is far quicker than by row."""
    if DATASETS is None:
        yield from table.iter(batch_size=size)
        return
    for batch in table.with_format("arrow").iter(batch_size=size):
        yield {field.name: values_of(batch[field.name], field.type) for field in batch.schema}


class FlatLists(NamedTuple):
    """A column of lists of integers laid end to end: `values` (total,), and where each list starts and ends.

    The arrays are numpy's, of integers whose width is the table's.
    """

    values: Any
    starts: Any
    ends: Any


def flat_batches(table: Dataset, names: Sequence[str], size: int) -> Iterator[list[FlatLists]]:
    """Columns of lists of integers, `size` rows at a time; quicker than their values as Python has them."""
    read = table.select_columns(list(names))
    for batch in (read if DATASETS is None else read.with_format("arrow")).iter(batch_size=size):
        yield [flat_lists(batch[name]) for name in names]


def flat_lists(column: "pyarrow.ChunkedArray | Sequence[Sequence[int]]") -> FlatLists:
    """The lists of a column, end to end."""
    if DATASETS is None:
        ends = np.fromiter(map(len, column), np.int64, len(column)).cumsum()
        values = np.fromiter((value for values in column for value in values), np.int64)
    else:
        ends = pyarrow.compute.list_value_length(column).to_numpy().cumsum()
        values = pyarrow.compute.list_flatten(column).to_numpy()
    return FlatLists(values, np.concatenate([[0], ends[:-1]]), ends)


def values_of(column: "pyarrow.ChunkedArray", kind: "pyarrow.DataType") -> list[Any]:
    """A column as Python values, JSON read."""
    if not isinstance(kind, pyarrow.BaseExtensionType):
        return list(column.to_pylist())
    texts = column.cast(kind.storage_type).to_pylist()
    return [None if text is None else json.loads(text) for text in texts]


def says(table: Dataset, name: str, text: str) -> bool:
    """Whether a JSON column holds `text` anywhere."""
    if DATASETS is None:
        return any(text in json.dumps(value, ensure_ascii=False) for value in table[name] if not isinstance(value, str))
    column = table.data.column(name)
    if not isinstance(column.type, pyarrow.BaseExtensionType):
        return False
    return bool(
        pyarrow.compute.any(pyarrow.compute.match_substring(column.cast(column.type.storage_type), text)).as_py()
    )
