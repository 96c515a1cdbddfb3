"""From tokenised rows to one batch of tensors. Knows nothing of where the rows came from."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.training.tokenization import IGNORED


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest row of the batch.

    Returns `input_ids`, `attention_mask` and `labels`, each (batch, longest); padding is masked by length, never by
    token id, because a tokenizer may pad with the end token that has to be learned.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
            batch["input_ids"][index, : len(ids)] = ids
            batch["attention_mask"][index, : len(ids)] = 1
            batch["labels"][index, : len(ids)] = torch.as_tensor(row.get("labels", ids), dtype=torch.long)
        return batch


@dataclass(frozen=True)
class PackedCollator:
    """Lays the rows of a batch end to end, without padding.

    Returns `input_ids`, `position_ids` (from 0 again in each row) and `labels`, each (1, tokens). The first label of a
    row is -100: it would be predicted by the row before.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, positions, labels = [], [], []
        for row in rows:
            own = torch.as_tensor(row["input_ids"], dtype=torch.long)
            goal = torch.as_tensor(row.get("labels", own), dtype=torch.long).clone()
            goal[0] = IGNORED
            ids.append(own)
            positions.append(torch.arange(len(own)))
            labels.append(goal)
        parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.cat(tensors)[None] for name, tensors in parts.items()}


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
