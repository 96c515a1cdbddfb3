"""The rows of a source that can be trained, and why the others cannot: for people who drop in a file as it is.

`load_rows` refuses a source for its first bad row, so that nothing is lost without a word. Here the words are the result:
each row that is left out is counted, and the first reasons are kept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.reading.shapes import WANTED, Columns, normalized
from adapterhub_lite.training.data.reading.tables import Dataset
from adapterhub_lite.training.data.rows import as_table, find_rows, shape_of

REASONS = 5
MOST_ROWS = 200_000


@dataclass(frozen=True)
class UsableRows:
    """(where, row) of every row that can be trained, `left_out` more and the first reasons, columns seen and not used."""

    found: tuple[tuple[str, dict[str, Any]], ...]
    left_out: int
    reasons: tuple[str, ...]
    columns: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def is_unnamed(self) -> bool:
        """Whether there is nothing to train because no column has a name that says what it is."""
        return not self.found and any(WANTED in reason for reason in self.reasons[:1])

    def table(self) -> Dataset:
        """The rows as training takes them.

        Raises:
            DataError: there are none; says why the first was left out.
        """
        if not self.found:
            raise DataError(
                self.reasons[0] if self.reasons else f"There are no rows. Give at least one, with {WANTED}."
            )
        return as_table(iter(self.found), "the file", Columns())

    def write(self, file: Path) -> Path:
        """Write the rows as JSONL, whole or not at all; `load_rows` reads them back as they are."""
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.writing")
        with beside.open("w", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in self.found)
        return beside.replace(file)


def usable_rows(
    source: Any, pair: tuple[str, str] | None = None, *, split: str = "train", config: str | None = None
) -> UsableRows:
    """Read `source` (as `load_rows` takes it), at most `MOST_ROWS` rows.

    `pair` names the column that is asked and the column that answers, where their names do not say so; each row becomes
    a chat of the two, which is how people will ask the adapter.

    Raises:
        DataError: it cannot be read as what its name says, or has more rows.
    """
    rows, name = find_rows(source, split, config)
    kept: list[tuple[str, dict[str, Any]]] = []
    reasons: list[str] = []
    seen: dict[str, None] = {}
    unused: set[str] = set()
    left_out, shape = 0, None
    for where, row in rows:
        short = where.replace(name, Path(name).name) if name else where
        if isinstance(row, Mapping):
            seen.update(dict.fromkeys(map(str, row)))
        try:
            made, extra = normalized(short, _of_pair(short, row, pair) if pair else row, Columns())
            if not has_words(made):
                raise DataError(f"{short}: the answer is empty.")
            kind = (shape_of(made), [type(made[key]) for key in shape_of(made)])
            shape = shape or kind
            if kind != shape:
                raise DataError(f"{short}: has {' and '.join(kind[0])}, the rows before have {' and '.join(shape[0])}.")
        except DataError as error:
            left_out += 1
            reasons += [str(error)] if len(reasons) < REASONS else []
            continue
        unused |= extra
        kept.append((short, made))
        if len(kept) > MOST_ROWS:
            raise DataError(f"{name} has more than {MOST_ROWS} rows. Train it with `adapterhub-lite train --data`.")
    return UsableRows(tuple(kept), left_out, tuple(reasons), tuple(seen), tuple(sorted(unused)))


def _of_pair(where: str, row: Any, pair: tuple[str, str]) -> dict[str, Any]:
    missing = [name for name in pair if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise DataError(f"{where}: there is no column {missing[0]!r}.")
    texts = {}
    for name, key in zip(pair, ("question", "answer"), strict=True):
        if not _words(row[name]):
            raise DataError(f"{where}: {name!r} is empty.")
        texts[key] = row[name]
    return texts


def has_words(row: Mapping[str, Any]) -> bool:
    """Whether what a row would teach is more than white space."""
    if "messages" in row:
        last = row["messages"][-1]
        return bool(last.get("tool_calls")) or _words(last.get("content"))
    answer = row.get("completion", row.get("text"))
    return (
        any(_words(turn.get("content")) or turn.get("tool_calls") for turn in answer)
        if isinstance(answer, list)
        else _words(answer)
    )


def _words(content: Any) -> bool:
    if isinstance(content, list):
        return any(_words(part.get("text")) for part in content)
    return isinstance(content, str) and bool(content.strip())
