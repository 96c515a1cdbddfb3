"""From tokenised rows to one batch of tensors. Knows nothing of where the rows came from."""

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
