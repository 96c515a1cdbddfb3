"""Evaluation as sums: loss, token accuracy and entropy of the valid tokens, a tile of logits at a time.

What is gathered from several processes are four numbers, never logits.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterhub_lite.losses import Head
from adapterhub_lite.training.data.collation import count_rows, learn_only_first
from adapterhub_lite.training.data.tokenization import IGNORED

TILE_TOKENS = 128


@dataclass
class EvaluationSums:
    """Sums over the valid tokens of every batch so far: tokens, loss, tokens guessed right, entropy (nats)."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, head: Head | None, hidden: Tensor, goals: Tensor) -> Tensor:
        """Take in hidden states (tokens, D) with their goals (tokens,), -100 ignored; returns the sum of the loss.

        Without a head, `hidden` are finished logits (tokens, V)."""
        valid = goals != IGNORED
        states, wanted = hidden[valid], goals[valid]
        batch = torch.zeros(4, dtype=torch.float64)
        with nullcontext(lambda logits: logits) if head is None else head.opened() as logits_of:
            for start in range(0, len(wanted), TILE_TOKENS):
                part = slice(start, start + TILE_TOKENS)
                batch += _tile(logits_of(states[part]).float(), wanted[part])
        self.sums += batch
        return batch[1]

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means over all valid tokens: `_loss`, `_token_accuracy`, `_entropy`, and how many there were."""
        tokens, loss, correct, entropy = self.sums.tolist()
        count = max(tokens, 1.0)
        return {
            f"{prefix}_loss": loss / count,
            f"{prefix}_token_accuracy": correct / count,
            f"{prefix}_entropy": entropy / count,
            f"{prefix}_tokens": tokens,
        }


def without_repeats(accelerator: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Ignore the rows that a loader repeated to give every process as many: they were evaluated already."""
    remainder = accelerator.gradient_state.remainder
    if accelerator.num_processes == 1 or not accelerator.gradient_state.end_of_dataloader or remainder <= 0:
        return batch
    rows = count_rows(batch)
    return learn_only_first(batch, min(rows, max(0, remainder - accelerator.process_index * rows)))


def _tile(logits: Tensor, wanted: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(-1)
    loss = -log_probabilities.gather(1, wanted[:, None]).sum()
    correct = (logits.argmax(-1) == wanted).sum()
    entropy = -(log_probabilities.exp() * log_probabilities).sum()
    return torch.tensor([len(wanted), loss.item(), correct.item(), entropy.item()], dtype=torch.float64)
