"""From tokenised rows to one batch of tensors. Knows nothing of where the rows came from."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.training.data.tokenization import IGNORED, WEIGHTS_COLUMN


def sequences_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (token ids, labels, weights) of each sequence in `rows`, all (length,); without labels the ids are learned.

    Tokens under an `attention_mask` of 0 are padding of somebody else's making, and left out. A row whose
    `position_ids` begin at 0 more than once was packed, and holds several sequences.
    """
    for row in rows:
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        labels = torch.as_tensor(row.get("labels", ids), dtype=torch.long)
        weights = torch.as_tensor(row.get(WEIGHTS_COLUMN, torch.ones(len(ids))), dtype=torch.float)
        again = (torch.as_tensor(row.get("position_ids", [])) == 0).nonzero()[:, 0].tolist()
        starts = sorted({0, *again})
        mask = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            real = mask[start:end]
            if real.any():
                yield ids[start:end][real], labels[start:end][real], weights[start:end][real]


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest sequence of the batch.

    Returns `input_ids`, `attention_mask` and `labels`, each (batch, longest), and `token_weights` where a row has them;
    padding is masked by length, never by token id, because a tokenizer may pad with the end token that has to be learned.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sequences = list(sequences_of(rows))
        shape = (len(sequences), max(len(ids) for ids, _, _ in sequences))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        if _weighted(rows):
            batch[WEIGHTS_COLUMN] = torch.zeros(shape)
        for index, (ids, labels, weights) in enumerate(sequences):
            batch["input_ids"][index, : len(ids)] = ids
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = labels
            if WEIGHTS_COLUMN in batch:
                batch[WEIGHTS_COLUMN][index, : len(ids)] = weights
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Lays the sequences of a batch end to end, without padding.

    Returns `input_ids`, `position_ids` (from 0 again in each sequence) and `labels`, each (1, tokens), and
    `token_weights` where a row has them. The first label of a sequence is -100: it would be predicted by the one before.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, positions, labels, weights = [], [], [], []
        for own, goals, counts in sequences_of(rows):
            ids.append(own)
            weights.append(counts)
            positions.append(torch.arange(len(own)))
            labels.append(F.pad(goals[1:], (1, 0), value=IGNORED))
        parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
        if _weighted(rows):
            parts[WEIGHTS_COLUMN] = weights
        return {name: torch.cat(tensors)[None] for name, tensors in parts.items()}


def _weighted(rows: Sequence[Mapping[str, Any]]) -> bool:
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


def unpack(batch: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return a packed batch padded, one row a sequence; a batch that is padded already goes through as it is."""
    if "position_ids" not in batch or "attention_mask" in batch:
        return dict(batch)
    starts = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
    spans = [slice(start, end) for start, end in itertools.pairwise(starts)]
    rows = [{"input_ids": batch["input_ids"][0, span], "labels": batch["labels"][0, span]} for span in spans]
    device = batch["input_ids"].device
    return {name: tensor.to(device) for name, tensor in PaddedCollator(pad_token_id)(rows).items()}
