"""The loss of a batch as a sum over its valid tokens, or by row; and what an evaluation sums beside it.

Everything is taken from hidden states, a tile of logits at a time; what is gathered from several processes are four
numbers, never logits. Knows an assembled model, not the trainer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from adapterhub_lite.losses import Head, causal_lm_loss, head_of, lm_loss_of_logits
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.collation import count_rows, learn_only_first
from adapterhub_lite.training.data.tokenization import IGNORED, WEIGHTS_COLUMN
from adapterhub_lite.training.model.assembly import Assembly
from adapterhub_lite.training.model.segments import segment_inputs, with_filler

TILE_TOKENS = 128


@dataclass(frozen=True)
class RowLosses:
    """Of each row of a batch: the `sums` of its tokens' losses, with gradient, and the `counts` of those; both (rows,)."""

    sums: Tensor
    counts: Tensor


# (losses by row, learned tokens of the whole accumulated and gathered batch) -> the loss.
RowLoss = Callable[[RowLosses, Tensor | int | None], Tensor]


@dataclass(frozen=True)
class PerRow:
    """A `compute_loss_func` that needs the losses of rows and no logits; see `per_row`."""

    function: RowLoss

    # Asked by whoever takes it for the usual kind: the logits then are the model's own.
    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The same loss from the model's own logits."""
        logits, goals = outputs.logits[:, :-1].float(), labels[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), goals, ignore_index=IGNORED, reduction="none")
        return self.function(RowLosses(losses.sum(1), (goals != IGNORED).sum(1)), num_items_in_batch)


def per_row(function: RowLoss) -> PerRow:
    """Make a `compute_loss_func` of a function of each row's loss; batches stay packed, and no logits are built.

    `function` is called with the `RowLosses` of a batch and `num_items_in_batch`, the learned tokens of the whole
    accumulated batch. As with every `compute_loss_func`, the sum over accumulated batches is what is learned: a mean over
    the rows of one batch is to be divided by the number of batches too (`loss_is_scaled_for_ga = False` does it).
    """
    return PerRow(function)


@dataclass
class EvaluationSums:
    """Sums over the valid tokens of every batch so far: tokens, loss, tokens guessed right, entropy (nats), router loss."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))

    def add(self, head: Head | None, hidden: Tensor, goals: Tensor) -> Tensor:
        """Take in hidden states (tokens, D) with their goals (tokens,), -100 ignored; returns the sum of the loss.

        Without a head, `hidden` are finished logits (tokens, V)."""
        valid = goals != IGNORED
        states, wanted = hidden[valid], goals[valid]
        batch = torch.zeros(5, dtype=torch.float64)
        with nullcontext(lambda logits: logits) if head is None else head.opened() as logits_of:
            for start in range(0, len(wanted), TILE_TOKENS):
                part = slice(start, start + TILE_TOKENS)
                batch += _tile(logits_of(states[part]).float(), wanted[part])
        self.sums += batch
        return batch[1]

    def metrics(self, prefix: str) -> dict[str, float]:
        """The means over all valid tokens: `_loss`, `_token_accuracy`, `_entropy`, and how many there were.

        The loss has the router loss in it, as in training; that is also given alone where there is one.
        """
        tokens, loss, correct, entropy, router = self.sums.tolist()
        count = max(tokens, 1.0)
        alone = {f"{prefix}_router_loss": router / count} if router else {}
        return {
            **alone,
            f"{prefix}_loss": (loss + router) / count,
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
    return torch.tensor([len(wanted), loss.item(), correct.item(), entropy.item(), 0.0], dtype=torch.float64)


class StepLoss:
    """Sums the loss of batches of one assembled model, by the implementation that was chosen for it."""

    def __init__(self, assembly: Assembly, args: AdapterTrainingArguments) -> None:
        self.assembly, self.args = assembly, args
        self._rounds = needs_round_lengths(assembly.model, args)

    def router(self, outputs: Any) -> Tensor | None:
        """The router loss of a mixture of experts as it enters the loss, as in transformers; None without one."""
        found = getattr(outputs, "aux_loss", None)
        return self.assembly.router_weight * found if self.assembly.router_weight and torch.is_tensor(found) else None

    def states(
        self, model: nn.Module, inputs: dict[str, Any], *, logits: bool = False
    ) -> tuple[Tensor, Head | None, Any]:
        """Run `model` on `inputs`; return its hidden states, the head that reads them, and the model's output.

        States may go on behind the tokens of `inputs`, where nothing is learned. Without a head, they are finished logits.
        With `logits`, the output has those of the tokens.
        """
        rest = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHTS_COLUMN)}
        if self._rounds and "input_ids" in rest:
            rest = with_filler(rest)
        if self.assembly.packing.packs and "position_ids" in rest and "attention_mask" not in rest:
            rest = segment_inputs(rest)
        # A model whose logits are more than its head gives is asked for them: the states are those logits then.
        own = self.assembly.loss.name == "model"
        hidden, outputs = self.assembly.hidden_states.of(model, rest, logits=own or logits)
        states, head = (outputs.logits, None) if own else (hidden, head_of(self.assembly.model))
        if (own or logits) and "input_ids" in inputs:
            outputs.logits = outputs.logits[:, : inputs["input_ids"].shape[1]]
        return states, head, outputs

    def by_row(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[RowLosses, Any]:
        """Return the losses of each row of a batch, padded or packed, and the model's output without its logits."""
        states, head, outputs = self.states(model, inputs)
        goals, weights = goals_of(inputs, states.shape[1])
        losses = self._losses(head, states, goals, weights, self.args.label_smoothing_factor, "none")
        tokens = inputs["labels"].shape[1]
        losses, goals = losses.view(goals.shape)[:, :tokens].flatten(), goals[:, :tokens]
        rows = rows_of_tokens(inputs)
        count = int(rows.max()) + 1
        sums = losses.new_zeros(count).index_add(0, rows, losses)
        counts = torch.zeros(count, dtype=torch.long, device=rows.device).index_add(
            0, rows, (goals != IGNORED).flatten().long()
        )
        return RowLosses(sums, counts), outputs

    def _losses(
        self,
        head: Head | None,
        states: Tensor,
        goals: Tensor,
        weights: Tensor | None,
        smoothing: float,
        reduction: str = "sum",
    ) -> Tensor:
        if head is None:
            return lm_loss_of_logits(
                states, goals, shift=False, label_smoothing=smoothing, token_weights=weights, reduction=reduction
            )
        return causal_lm_loss(
            head,
            states,
            goals,
            shift=False,
            choice=self.assembly.loss,
            label_smoothing=smoothing,
            token_weights=weights,
            chunk_tokens=self.args.loss_chunk_tokens,
            reduction=reduction,
        )

    def sum(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        sums: EvaluationSums | None = None,
        smoothing: float | None = None,
        logits: bool = False,
    ) -> tuple[Tensor, Tensor, Any]:
        """Return (sum of the loss over valid tokens, how many there are, the model's output; with `logits`, with them).

        `model` is the assembled one as the engine wrapped it; `inputs` holds `labels` (batch, seq) with -100 where
        nothing is learned. With `sums`, accuracy and entropy are taken on the way, and there is no gradient.
        `smoothing` None is that of the arguments.
        """
        states, head, outputs = self.states(model, inputs, logits=logits)
        # An evaluation counts each token once, whatever its weight.
        goals, weights = goals_of(inputs, states.shape[1])
        valid = (goals != IGNORED).sum()
        if sums is not None:
            router = self.router(outputs)
            if router is not None:
                sums.sums[4] += float(router) * int(valid)
            return sums.add(head, states.flatten(0, 1), goals.flatten()), valid, outputs
        if self.args.loss_type == "dft" and smoothing is None:
            each = self._losses(head, states, goals, weights, self.args.label_smoothing_factor, "none")
            # The gradient is that of the token's likelihood (arXiv:2508.05629).
            return (each * (-each.detach()).exp()).sum(), valid, outputs
        smoothing = self.args.label_smoothing_factor if smoothing is None else smoothing
        return self._losses(head, states, goals, weights, smoothing), valid, outputs


def needs_round_lengths(model: Any, args: TrainingArguments) -> bool:
    """Whether batches are lengthened to `rounded_tokens`: products are in 16 bits on a CPU, and no noise depends on it."""
    narrow = model.dtype != torch.float32 or args.bf16 or args.fp16
    return model.device.type == "cpu" and narrow and args.neftune_noise_alpha is None


def goals_of(batch: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor | None]:
    """What each of (batch, tokens) states is to predict, -100 for nothing, and its weight where tokens have weights.

    The labels move, not the states: the states' slice would be a copy.
    """
    behind = tokens - batch["labels"].shape[1] + 1
    goals = F.pad(batch["labels"][:, 1:], (0, behind), value=IGNORED)
    return goals, F.pad(batch[WEIGHTS_COLUMN][:, 1:], (0, behind)) if WEIGHTS_COLUMN in batch else None


def rows_of_tokens(batch: dict[str, Any]) -> Tensor:
    """Which row each token of a batch belongs to, (batch * seq,), whether rows are padded or laid end to end."""
    ids = batch["input_ids"]
    if "position_ids" in batch and "attention_mask" not in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0) - 1
    return torch.arange(ids.shape[0], device=ids.device)[:, None].expand(ids.shape).flatten()
