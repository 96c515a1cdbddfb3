"""Tables written a batch at a time: in memory while they are small, in a temporary file that is mapped once they are not.

So preparing rows takes the memory of a batch, whatever their number, as `datasets` does; without its Python loop over
every value.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetInfo, Features
from datasets.table import InMemoryTable

# What stays in memory; a table beyond it goes to a file.
MOST_BYTES_IN_MEMORY = 16 << 20
_folder: tempfile.TemporaryDirectory[str] | None = None


class TableWriter:
    """Takes batches of columns and gives a `Dataset` in the end. The temporary file goes away with the process."""

    def __init__(self, features: Features, description: str = "") -> None:
        self._info = DatasetInfo(description=description, features=features)
        self._schema: pyarrow.Schema = features.arrow_schema
        self._batches: list[pyarrow.RecordBatch] = []
        self._bytes = 0
        self._file: Path | None = None
        self._stream: Any = None  # pyarrow has no types of its own

    @property
    def names(self) -> list[str]:
        """The columns there are."""
        return list(self._schema.names)

    def write(self, columns: Mapping[str, Sequence[Any] | pyarrow.Array]) -> None:
        """Add rows, as equally long columns; JSON columns hold their text."""
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
        if self._stream is None:
            return Dataset(InMemoryTable(pyarrow.Table.from_batches(self._batches, self._schema)), info=self._info)
        self._stream.close()
        return Dataset.from_file(str(self._file), info=self._info)


def array_of(values: Sequence[Any] | pyarrow.Array, kind: pyarrow.DataType) -> pyarrow.Array:
    """Values as an Arrow array of a kind; JSON columns are given their text."""
    if isinstance(values, pyarrow.Array):
        return values.cast(kind)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return pyarrow.ExtensionArray.from_storage(kind, pyarrow.array(values, kind.storage_type))
    return pyarrow.array(values, kind)


def column_batches(table: Dataset, size: int) -> Iterator[dict[str, list[Any]]]:
    """The columns of `table`, `size` rows at a time; JSON is read a column at a time, which is far quicker than by row."""
    for batch in table.with_format("arrow").iter(batch_size=size):
        yield {field.name: values_of(batch[field.name], field.type) for field in batch.schema}


def values_of(column: pyarrow.ChunkedArray, kind: pyarrow.DataType) -> list[Any]:
    """A column as Python values, JSON read."""
    if not isinstance(kind, pyarrow.BaseExtensionType):
        return list(column.to_pylist())
    texts = column.cast(kind.storage_type).to_pylist()
    return [None if text is None else json.loads(text) for text in texts]


def says(table: Dataset, name: str, text: str) -> bool:
    """Whether a JSON column holds `text` anywhere."""
    column = table.data.column(name)
    if not isinstance(column.type, pyarrow.BaseExtensionType):
        return False
    return bool(
        pyarrow.compute.any(pyarrow.compute.match_substring(column.cast(column.type.storage_type), text)).as_py()
    )
