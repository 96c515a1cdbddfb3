"""The loss of a batch as a sum over its valid tokens, and what an evaluation sums beside it: accuracy and entropy.

Everything is taken from hidden states, a tile of logits at a time; what is gathered from several processes are four
numbers, never logits. Knows an assembled model, not the trainer.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterhub_lite.losses import Head, causal_lm_loss, head_of, lm_loss_of_logits
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.collation import count_rows, learn_only_first
from adapterhub_lite.training.data.tokenization import IGNORED, WEIGHTS_COLUMN
from adapterhub_lite.training.model.assembly import Assembly
from adapterhub_lite.training.model.segments import segment_inputs

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


class StepLoss:
    """Sums the loss of batches of one assembled model, by the implementation that was chosen for it."""

    def __init__(self, assembly: Assembly, args: AdapterTrainingArguments) -> None:
        self.assembly, self.args = assembly, args

    def sum(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        sums: EvaluationSums | None = None,
        smoothing: float | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Return (sum of the loss over valid tokens, how many there are, the model's output without its logits).

        `model` is the assembled one as the engine wrapped it; `inputs` holds `labels` (batch, seq) with -100 where
        nothing is learned. With `sums`, accuracy and entropy are taken on the way, and there is no gradient.
        `smoothing` None is that of the arguments.
        """
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHTS_COLUMN)}
        if self.assembly.packing.packs and "position_ids" in rest and "attention_mask" not in rest:
            rest = segment_inputs(rest)
        # A model whose logits are more than its head gives is asked for them: the states are those logits then.
        own = self.assembly.loss.name == "model"
        hidden, outputs = self.assembly.hidden_states.of(model, rest, logits=own)
        states = outputs.logits if own else hidden
        # The labels move, not the states: the states' slice would be a copy.
        goals = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        valid = (goals != IGNORED).sum()
        # Of a turn that counts more or less than others; an evaluation counts each token once.
        weights = F.pad(inputs[WEIGHTS_COLUMN][:, 1:], (0, 1)) if WEIGHTS_COLUMN in inputs else None
        head = None if own else head_of(self.assembly.model)
        if sums is not None:
            return sums.add(head, states.flatten(0, 1), goals.flatten()), valid, outputs
        smoothing = self.args.label_smoothing_factor if smoothing is None else smoothing
        if head is None:
            total = lm_loss_of_logits(states, goals, shift=False, label_smoothing=smoothing, token_weights=weights)
        else:
            total = causal_lm_loss(
                head,
                states,
                goals,
                shift=False,
                choice=self.assembly.loss,
                label_smoothing=smoothing,
                token_weights=weights,
                chunk_tokens=self.args.loss_chunk_tokens,
            )
        return total, valid, outputs
