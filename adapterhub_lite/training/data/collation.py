"""From tokenised rows to one batch of tensors. Knows nothing of where the rows came from."""

import collections.abc
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.errors import DataError
from adapterhub_lite.memory.stand_ins import rounded_tokens
from adapterhub_lite.training.data.tokenization import IGNORED, WEIGHTS_COLUMN

PADDED_COLUMNS = ("input_ids", "attention_mask", "labels")
Rows = collections.abc.Sequence[Mapping[str, Any]]  # rows of a tokenised table


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch: token ids, labels (None where there are none) and weights, all (length,)."""

    ids: Tensor
    labels: Tensor | None
    weights: Tensor


def sequences_of(rows: Iterable[Mapping[str, Any]], *, learn_ids: bool = True) -> Iterator[Sequence]:
    """Yield each sequence in `rows`; with `learn_ids`, the ids are learned where there are no labels.

    Tokens under an `attention_mask` of 0 are padding of somebody else's making, and left out. A row whose
    `position_ids` begin at 0 more than once was packed, and holds several sequences.
    """
    for row in rows:
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        found = row.get("labels", ids if learn_ids else None)
        labels = None if found is None else torch.as_tensor(found, dtype=torch.long)
        weights = torch.as_tensor(row.get(WEIGHTS_COLUMN, torch.ones(len(ids))), dtype=torch.float)
        again = (torch.as_tensor(row.get("position_ids", [])) == 0).nonzero()[:, 0].tolist()
        starts = sorted({0, *again})
        mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            real = mask[start:end]
            if real.any():
                goals = None if labels is None else labels[start:end][real]
                yield Sequence(ids[start:end][real], goals, weights[start:end][real])


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest sequence of the batch, or to the next multiple of `multiple` tokens, or where it
    `rounds` to the next of the lengths that 16-bit products are asked for (`rounded_tokens`).

    Returns `input_ids`, `attention_mask` and `labels`, each (batch, longest), and `token_weights` where a row has them;
    padding is masked by length, never by token id, because a tokenizer may pad with the end token that has to be learned.
    Rows without labels learn their ids, unless `learn_ids` is False: then there are no labels.
    """

    pad_token_id: int
    multiple: int = 1
    learn_ids: bool = True
    rounds: bool = False

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        sequences = list(sequences_of(rows, learn_ids=self.learn_ids))
        longest = max(len(one.ids) for one in sequences)
        if self.rounds and self.multiple == 1:
            longest = rounded_tokens(longest, len(sequences))
        shape = (len(sequences), -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        if _labelled(sequences):
            batch["labels"] = torch.full(shape, IGNORED, dtype=torch.long)
        if _weighted(rows):
            batch[WEIGHTS_COLUMN] = torch.zeros(shape)
        for index, one in enumerate(sequences):
            length = len(one.ids)
            batch["input_ids"][index, :length] = one.ids
            batch["attention_mask"][index, :length] = 1
            if one.labels is not None:
                batch["labels"][index, :length] = one.labels
            if WEIGHTS_COLUMN in batch:
                batch[WEIGHTS_COLUMN][index, :length] = one.weights
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Lays the sequences of a batch end to end, without padding.

    Returns `input_ids`, `position_ids` (from 0 again in each sequence) and `labels`, each (1, tokens), and
    `token_weights` where a row has them. The first label of a sequence is -100: it would be predicted by the one before.
    """

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        sequences = list(sequences_of(rows))
        parts = {
            "input_ids": [one.ids for one in sequences],
            "position_ids": [torch.arange(len(one.ids)) for one in sequences],
            "labels": [F.pad(one.labels[1:], (1, 0), value=IGNORED) for one in sequences if one.labels is not None],
        }
        if _weighted(rows):
            parts[WEIGHTS_COLUMN] = [one.weights for one in sequences]
        return {name: torch.cat(tensors)[None] for name, tensors in parts.items()}


def _labelled(sequences: list[Sequence]) -> bool:
    """Whether the sequences have labels.

    Raises:
        DataError: some have, and others have not.
    """
    labelled = [one.labels is not None for one in sequences]
    if any(labelled) != all(labelled):
        raise DataError("Some rows of a batch have labels and others have none. Give all of them labels, or none.")
    return all(labelled)


def _weighted(rows: Rows) -> bool:
    return any(row.get(WEIGHTS_COLUMN) is not None for row in rows)


def learn_only_first(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Return the batch with the labels of all but its first `rows` rows ignored."""
    labels = batch["labels"].clone()
    if "position_ids" in batch and "attention_mask" not in batch:
        labels[(batch["position_ids"] == 0).cumsum(-1) > rows] = IGNORED
    else:
        labels[rows:] = IGNORED
    return {**batch, "labels": labels}


def count_rows(batch: Mapping[str, Tensor]) -> int:
    """How many rows a batch holds, padded or packed."""
    if "position_ids" in batch and "attention_mask" not in batch:
        return int((batch["position_ids"] == 0).sum())
    return len(batch["input_ids"])
