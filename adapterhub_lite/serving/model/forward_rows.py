"""The general forward pass: one row after the other, each as `generate` computes it, with its own kind of state.

Right for whatever `generate` runs: the row's state is what `generate` itself prepares and carries on (keys and values,
convolution windows, state-space or linear-attention states), through transformers' own classes. Slower than a batch,
because the base is read once for every row. Where a family keeps its state in its modules, or none, every token is
computed from the whole row again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from adapterhub_lite.bases.structure import token_bytes
from adapterhub_lite.serving.adapters.weights import Family, Parts
from adapterhub_lite.serving.model.lora.changed_modules import ChangedModules
from adapterhub_lite.serving.model.packed_step import Step


class RowLora:
    """The adapters of the rows, for passes that compute one row at a time; the plain formula of LoRA.

    y + sum over parts of factor * scale * (x A^T) B, arXiv:2106.09685, in float32.
    """

    def __init__(self, rows: int) -> None:
        self._rows: list[Parts] = [()] * rows
        self._now: Parts = ()

    def place(self, row: int, parts: Parts) -> None:
        """Route `row` to the sum of `parts`; no parts is the base."""
        self._rows[row] = parts

    def leave(self, row: int) -> None:
        """Drop the weights of a row."""
        self._rows[row] = ()

    def shrink(self) -> None:
        """Nothing is held beyond the rows in use."""

    def begin(self, step: Step) -> None:
        """Nothing is computed ahead."""

    def of(self, row: int) -> Parts:
        """The parts that a row is answered with."""
        return self._rows[row]

    def use(self, row: int | None) -> None:
        """Answer for this row from now on; None for the base."""
        self._now = () if row is None else self._rows[row]

    def delta(self, name: str, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to the output of a family's layer for the input x (..., in), or None."""
        total = None
        for part in self._now:
            if part.weights.has(name, layer):
                more = part.weights.product(name, layer, x) * part.factor
                total = more if total is None else total + more
        return total


def cat_logits(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits of rows one below the other; -inf for the tokens that only others of them have."""
    widest = max(one.shape[-1] for one in logits)
    return torch.cat([functional.pad(one, (0, widest - one.shape[-1]), value=-torch.inf) for one in logits])


@dataclass
class RowState:
    """A row's tokens so far (1, n), and what `generate` carries from step to step."""

    ids: torch.Tensor
    config: Any = None  # a GenerationConfig
    carried: dict[str, Any] = field(default_factory=dict)  # whatever the family's forward takes
    outputs: Any = None  # the last step's ModelOutput, without its logits


class RowForward:
    """Computes the rows of a step one by one. With `keeps_state` False nothing is carried from step to step."""

    def __init__(
        self, model: PreTrainedModel, families: tuple[Family, ...], rows: int, *, keeps_state: bool = True
    ) -> None:
        self._model, self._keeps_state, self._rows = model, keeps_state, rows
        self.budget: int | None = None
        self.nbytes = 0
        self.lora = RowLora(rows)
        self._changed = ChangedModules(model)
        self._states: dict[int, RowState] = {}
        self._hooks = [
            model.get_submodule(path).register_forward_hook(self._adding(family.name, layer))
            for family in families
            for layer, path in enumerate(family.paths)
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Nothing of its own: the model's tensors are where they were."""
        return {}

    def move(self, source: int, target: int) -> None:
        """Hand the state of row `source` to row `target`; there is none before a row's first step."""
        state = self._states.pop(source, None)
        self.spoil(target)
        if state is not None:
            self._states[target] = state

    def spoil(self, row: int) -> None:
        """Forget a row's state."""
        self._states.pop(row, None)

    leave = spoil

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether rows of so many tokens fit into the budget, were their states keys and values."""
        if len(needs) > self._rows or self.budget is None or not self._keeps_state:
            return len(needs) <= self._rows
        return sum(needs) * token_bytes(self._model.config.get_text_config(), self._model.dtype) <= self.budget

    def reserve(self, _row: int, _need: int) -> None:
        """Nothing: a state grows as it is written."""

    def shrink(self) -> None:
        """Drop every state. Only when no row is in use."""
        self._states.clear()

    def forward(self, step: Step) -> torch.Tensor:
        """Return the logits (tokens that want them, vocabulary), in the order of the step's rows."""
        logits, start = [], 0
        for row, last, count in zip(step.rows, step.last.tolist(), step.counts, strict=True):
            ids = step.token_ids[start : last + 1][None]
            self.lora.use(row)
            try:
                with self._changed.applied(self.lora.of(row)):
                    logits.append(self._row(row, int(step.positions[start]), ids, count))
            finally:
                self.lora.use(None)
            start = last + 1
        return cat_logits(logits)

    def _row(self, row: int, position: int, ids: torch.Tensor, count: int) -> torch.Tensor:
        if position == 0:
            self._states[row] = RowState(ids)
        else:
            known = self._states[row]
            known.ids = torch.cat((known.ids[:, :position], ids), dim=1)
        state = self._states[row]
        if not self._keeps_state:
            out = self._model(input_ids=state.ids, attention_mask=torch.ones_like(state.ids), use_cache=False)
            wanted: torch.Tensor = out.logits[0, -count:]
            return wanted
        # The steps of `GenerationMixin._sample`, which has no public form that gives logits one at a time. The proof at
        # start compares them with `generate` itself.
        model: Any = self._model
        if position == 0:
            state.config, state.carried = generation_state(self._model, ids)
            out = model._prefill(ids, state.config, state.carried)
        else:
            new = ids.shape[1]
            state.carried = model._update_model_kwargs_for_generation(state.outputs, state.carried, num_new_tokens=new)
            inputs = model.prepare_inputs_for_generation(state.ids, next_sequence_length=new, **state.carried)
            out = model(**inputs, return_dict=True)
        wanted = out.logits[0, -1:].clone()
        out.logits = None
        state.outputs = out
        if count > 1:
            # `generate` computes no logits inside a prompt; a prompt is always in one piece here.
            assert position == 0, "the logits of several tokens are those of a whole prompt"
            whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            wanted = whole[0, -count:]
        return wanted

    def _adding(self, name: str, layer: int) -> Any:  # torch's own type of a hook
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor | None:
            delta = self.lora.delta(name, layer, inputs[0])
            return None if delta is None else (y + delta).to(y.dtype)

        return add


def greedy_settings(tokens: int) -> dict[str, Any]:
    """The arguments of a `generate` that makes exactly this many tokens, each the likeliest."""
    return {
        "do_sample": False, "num_beams": 1, "max_new_tokens": tokens, "min_new_tokens": None, "eos_token_id": None,
        "pad_token_id": 0, "use_cache": True, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
        "suppress_tokens": None, "begin_suppress_tokens": None, "forced_eos_token_id": None,
    }  # fmt: skip


def generation_state(model: PreTrainedModel, ids: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """What `generate` has ready before its first forward for ids (1, n): its configuration and the model's arguments."""
    kept: list[tuple[Any, dict[str, Any]]] = []

    def keep(
        _model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: object = None,
        stopping_criteria: object = None,
        generation_config: Any = None,
        **carried: Any,
    ) -> torch.Tensor:
        kept.append((generation_config, carried))
        return input_ids

    model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=keep, **greedy_settings(1))  # type: ignore[operator]
    return kept[0]
