"""The loss of a batch as a sum over its valid tokens, from hidden states. Knows an assembled model, not the trainer."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from adapterhub_lite.losses import causal_lm_loss, head_of, lm_loss_of_logits
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.data.tokenization import IGNORED
from adapterhub_lite.training.evaluation import EvaluationSums
from adapterhub_lite.training.model.assembly import Assembly
from adapterhub_lite.training.model.shortcuts import segment_inputs


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
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        if self.assembly.packing.packs and "position_ids" in rest and "attention_mask" not in rest:
            rest = segment_inputs(rest)
        # A model whose logits are more than its head gives is asked for them: the states are those logits then.
        own = self.assembly.loss.name == "model"
        hidden, outputs = self.assembly.hidden_states.of(model, rest, logits=own)
        states = outputs.logits if own else hidden
        # The labels move, not the states: the states' slice would be a copy.
        goals = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        valid = (goals != IGNORED).sum()
        head = None if own else head_of(self.assembly.model)
        if sums is not None:
            return sums.add(head, states.flatten(0, 1), goals.flatten()), valid, outputs
        smoothing = self.args.label_smoothing_factor if smoothing is None else smoothing
        if head is None:
            total = lm_loss_of_logits(states, goals, shift=False, label_smoothing=smoothing)
        else:
            total = causal_lm_loss(
                head,
                states,
                goals,
                shift=False,
                choice=self.assembly.loss,
                label_smoothing=smoothing,
                chunk_tokens=self.args.loss_chunk_tokens,
            )
        return total, valid, outputs
