"""A held-out share of the rows, drawn so that no text stands on both sides."""

import hashlib
import json
import random
from collections.abc import Iterator

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.reading.tables import Dataset, column_batches
from adapterhub_lite.training.data.rows import SOURCE_COLUMN

ROWS_AT_A_TIME = 1000


def split_rows(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide a table of rows into (training, held out); about `share` of the rows, chosen by `seed`, are held out.

    Rows with equal text go to one side together.

    Raises:
        DataError: one of the two would be empty.
    """
    places: dict[bytes, list[int]] = {}
    for index, text in enumerate(row_digests(rows)):
        places.setdefault(text, []).append(index)
    order = list(places)
    random.Random(seed).shuffle(order)
    held: list[int] = []
    most = max(1, round(share * len(rows)))
    for text in order:
        if len(held) < most:
            held += places[text]
    taken = set(held)
    kept = [index for index in range(len(rows)) if index not in taken]
    if not kept:
        raise DataError(
            f"No rows are left to train on when {share:g} of {len(rows)} are held out: {len(places)} of them have texts of "
            "their own. Give more rows, or evaluation rows of their own."
        )
    return rows.select(kept), rows.select(sorted(held))


def without_rows_of(held_out: Dataset, rows: Dataset) -> tuple[Dataset, int]:
    """`held_out` without the rows whose text is in `rows` too, and how many those are.

    Raises:
        DataError: none are left.
    """
    trained = set(row_digests(rows))
    kept = [index for index, text in enumerate(row_digests(held_out)) if text not in trained]
    if not kept:
        raise DataError("Each of the evaluation rows is among the training rows. Give others.")
    return held_out.select(kept), len(held_out) - len(kept)


def row_digests(rows: Dataset) -> Iterator[bytes]:
    """The sha256 of what each row holds, wherever it stood."""
    for batch in column_batches(rows, ROWS_AT_A_TIME):
        names = sorted(set(batch) - {SOURCE_COLUMN})
        for values in zip(*(batch[name] for name in names), strict=True):
            text = json.dumps([values], sort_keys=True, ensure_ascii=False)
            yield hashlib.sha256(" ".join(text.split()).encode()).digest()
