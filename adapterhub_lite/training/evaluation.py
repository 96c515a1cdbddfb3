"""Evaluation as sums: loss, token accuracy and entropy of the valid tokens, a tile of logits at a time.

What is gathered from several processes are four numbers, never logits.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.losses import Head
from adapterhub_lite.training.tokenization import IGNORED

TILE_TOKENS = 128


@dataclass
class EvaluationSums:
    """Sums over the valid tokens of every batch so far: tokens, loss, tokens guessed right, entropy (nats)."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, head: Head, hidden: Tensor, goals: Tensor) -> Tensor:
        """Take in hidden states (tokens, D) with their goals (tokens,), -100 ignored; returns the sum of the loss."""
        valid = goals != IGNORED
        states, wanted = hidden[valid], goals[valid]
        batch = torch.zeros(4, dtype=torch.float64)
        for start in range(0, len(wanted), TILE_TOKENS):
            batch += _tile(head, states[start : start + TILE_TOKENS], wanted[start : start + TILE_TOKENS])
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


def _tile(head: Head, states: Tensor, wanted: Tensor) -> Tensor:
    logits = (F.linear(states, head.weight, head.bias) * head.logit_scale).float()
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    log_probabilities = logits.log_softmax(-1)
    loss = -log_probabilities.gather(1, wanted[:, None]).sum()
    correct = (logits.argmax(-1) == wanted).sum()
    entropy = -(log_probabilities.exp() * log_probabilities).sum()
    return torch.tensor([len(wanted), loss.item(), correct.item(), entropy.item()], dtype=torch.float64)
