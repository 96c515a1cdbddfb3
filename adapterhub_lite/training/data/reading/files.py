"""Rows out of files: JSONL, a JSON array, CSV, TSV, parquet, a folder of them, or a data set on the Hub.

Each row comes with where it stands, so that whatever is wrong in it can be named. Values stay as they are written: a
CSV cell is text ("007", "NA"), and two rows of a JSONL file may hold different keys.
"""

import codecs
import csv
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from adapterhub_lite.errors import DataError, MissingExtraError
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.training.data.reading.shapes import WANTED, short
from adapterhub_lite.training.data.reading.tables import (
    DATASETS,
    Dataset,
    DatasetDict,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

Found = Iterator[tuple[str, Any]]
TEXT_FILES = {".jsonl": ",", ".json": ",", ".ndjson": ",", ".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# The longest cell of a CSV file; Python's own limit is 128 KiB.
MOST_CELL_CHARACTERS = 64 << 20
SNIFFED_LINES = 20


def read_path(path: Path, split: str) -> Found:
    """Yield (where, row) of a file or a folder.

    Raises:
        DataError: it cannot be read as what its name says; names the line.
    """
    if path.is_dir():
        return read_folder(path, split)
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_csv(path)
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        raise DataError(f"{path} is a spreadsheet. Save it as CSV (UTF-8) and give that.")
    if path.suffix.lower() in (".gz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".tar"):
        raise DataError(f"{path} is compressed. Unpack it first.")
    return read_json(path)


def _open_text(path: Path) -> TextIO:
    # What Windows saves begins with a byte order mark, also Excel's "Unicode text"; utf-8-sig takes it away, and reads
    # files without one too.
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.open(encoding="utf-16" if wide else "utf-8-sig", newline="")


def read_json(path: Path) -> Found:
    """Yield (where, row) of a JSONL file, or of a file that holds one JSON array."""
    try:
        with _open_text(path) as file:
            first = next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "")
            file.seek(0)
            if first == "[":
                yield from read_json_array(path, file)
            else:
                yield from _read_jsonl(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def read_json_array(path: Path, file: TextIO) -> Found:
    """Yield (where, row) of one JSON array."""
    text = file.read()
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            # Lines of lists: a JSONL file whose rows are no objects, which is said of the row.
            json.loads(text.splitlines()[0])
        except ValueError:
            raise DataError(f"{path}, line {error.lineno}: not the JSON array it begins as ({error.msg}).") from error
        file.seek(0)
        yield from _read_jsonl(path, file)
        return
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _read_jsonl(path: Path, file: TextIO) -> Found:
    # Not by the file's own lines: with newline="" a lone carriage return would end one.
    for number, line in enumerate(lines_of(file), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: expected one JSON object, found {short(line)} ({error.msg}). "
                "Write one whole JSON object a line (JSONL)."
            ) from error
        except RecursionError as error:
            raise DataError(f"{where}: the JSON is nested too deeply.") from error


def lines_of(file: TextIO) -> Iterator[str]:
    """The lines of a file that end in a newline alone: other separators may stand inside a JSON text."""
    rest = ""
    while block := file.read(1 << 20):
        *lines, rest = (rest + block).split("\n")
        yield from lines
    if rest:
        yield rest


def read_csv(path: Path) -> Found:
    """Yield (where, row) of a CSV or TSV file; each cell is the text that is written in it. Empty rows are left out."""
    csv.field_size_limit(MOST_CELL_CHARACTERS)
    try:
        with _open_text(path) as file:
            head = list(islice(file, SNIFFED_LINES))
            delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter_of(head)
            reader = csv.reader(chain(head, file), delimiter=delimiter, strict=True)
            names = next(reader, [])
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise DataError(f"{path}: two columns are called {doubled[0]!r}. Rename one.")
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}, line {line}", reader.line_num + 1
                if not any(cells):
                    continue  # spreadsheets export empty rows below their table
                if [cells[0].removeprefix("\ufeff"), *cells[1:]] == names:
                    raise DataError(
                        f"{where}: the names of the columns stand here again, as where two files were put together. Remove "
                        "the line."
                    )
                if len(cells) != len(names):
                    raise DataError(
                        f"{where}: expected {len(names)} cells as in the first line, found {len(cells)}. "
                        'Put cells that hold the separator or a line end in "quotes".'
                    )
                yield where, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as CSV UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"{path} is not the CSV it should be: {error}.") from error


def delimiter_of(head: list[str]) -> str:
    """The separator of the first line: the one of `,;|` and tab that divides it into most names."""
    first = head[0] if head else ""
    counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in (",", ";", "\t", "|")}
    return max(counts, key=lambda mark: counts[mark])


def read_parquet(path: Path) -> Found:
    """Yield (where, row) of a parquet file."""
    if DATASETS is None:
        raise missing_extra("Reading a parquet file", "train")
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches()
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path}, row {number}", without_none(row)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}.") from error


def read_folder(path: Path, split: str) -> Found:
    """Yield (where, row) of a folder that `datasets` saved, or of the files in it that make a split."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        table = load_from_disk(str(path))
        if isinstance(table, DatasetDict):
            if split not in table:
                raise DataError(f"{path} has no split {split!r}, found {', '.join(map(str, table))}. Name one.")
            table = table[split]
        yield from read_table(table, str(path))
        return
    try:
        files = load_dataset_builder(str(path)).config.data_files or {}
    except MissingExtraError:
        raise
    except Exception as error:  # whatever its builders raise for a folder
        raise DataError(f"No rows could be found in the folder {path}: {error}") from error
    if split not in files:
        raise DataError(f"{path} has no split {split!r}, found {', '.join(map(str, files)) or 'none'}. Name one.")
    for name in files[split]:
        yield from read_path(Path(str(name)), split)


def read_hub(name: str, config: str | None, split: str) -> Found:
    """Yield (where, row) of a data set on the Hub.

    Raises:
        DataError: there is none, or it cannot be reached.
    """
    try:
        table = load_dataset(name, config, split=split)
    except MissingExtraError:
        raise
    except Exception as error:  # its loaders raise what they meet
        raise DataError(
            f"{name!r} is no file here, and as a data set (split {split!r}) it could not be loaded: {error} "
            f"Check the spelling and the network, or give a file with {WANTED}."
        ) from error
    yield from read_table(table, f"{name}[{split}]")


def read_table(table: Dataset | IterableDataset, name: str = "") -> Found:
    """Yield (where, row) of a table in memory."""
    for number, row in enumerate(table):
        yield f"{name} row {number}".strip(), without_none(row)


def without_none(value: Any) -> Any:
    """Leave out keys whose value is None: tables of one column per key fill up with them what a row does not have."""
    if isinstance(value, dict):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value
