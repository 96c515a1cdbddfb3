"""The trained head in one pass: loss and every gradient with three products instead of four. Nothing here knows autograd.

It holds where each token's share in the loss is known beforehand, as in a sum or a mean. A panel of tokens is taken
through the whole vocabulary, its exponentials are kept, and its part of the head's gradient made from them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterhub_lite.losses.passes import Gradients, Problem, Statistics, statistics
from adapterhub_lite.losses.rows import RowReader
from adapterhub_lite.losses.tiles import Panel, panel_shape, product_dtype, spans, wide_dtype


@dataclass(frozen=True)
class WeighedLoss:
    """The sum of the weighed losses, and its gradients, in the wide dtype."""

    loss: Tensor
    gradients: Gradients


def in_one_pass(problem: Problem) -> bool:
    """Whether the head's gradient can be made here: hidden states times a token's share leave the range of fp16."""
    return problem.options.linear and product_dtype(problem.hidden.dtype, problem.hidden.device) != torch.float16


def weighed_loss(
    problem: Problem,
    read: RowReader,
    weights: Tensor,
    *,
    hidden_wanted: bool,
    rows_wanted: slice | None,
    bias_wanted: bool,
) -> WeighedLoss:
    """The sum over n tokens of `weights` (n,) times loss, with the gradients that are wanted.

    `rows_wanted` gives the columns of the head that are trained: all of them, or those of a LoRA pair.
    """
    wide, device = wide_dtype(problem.hidden.dtype), problem.hidden.device
    problem = replace(problem, hidden=problem.hidden.to(product_dtype(problem.hidden.dtype, device)))
    shape = panel_shape(len(weights), problem.vocabulary, device, problem.options.chunk_tokens)
    panel = Panel(shape, problem.vocabulary, problem.hidden.dtype, device)
    width = 0 if rows_wanted is None else rows_wanted.stop - rows_wanted.start
    found = Gradients(
        torch.empty(problem.hidden.shape, dtype=wide, device=device) if hidden_wanted else None,
        torch.zeros((problem.vocabulary, width), dtype=wide, device=device) if rows_wanted is not None else None,
        torch.zeros(problem.vocabulary, dtype=wide, device=device) if bias_wanted else None,
    )
    loss = torch.zeros((), dtype=wide, device=device)
    for part in spans(len(weights), shape.tokens):
        some = replace(problem, hidden=problem.hidden[part], targets=problem.targets[part])
        known = statistics(some, read, gradient=hidden_wanted, kept=panel)
        loss += (known.losses * weights[part]).sum()
        if found.hidden is not None and known.gradient is not None:
            torch.mul(known.gradient, weights[part, None], out=found.hidden[part])
        states = some.hidden if rows_wanted is None else some.hidden[:, rows_wanted]
        _add_panel(found, panel, known, states, some.targets, weights[part] * problem.options.logit_scale)
        if problem.options.label_smoothing:
            _take_smoothing(found, states, weights[part], problem)
    return WeighedLoss(loss, found)


def _add_panel(
    found: Gradients, panel: Panel, known: Statistics, states: Tensor, targets: Tensor, weights: Tensor
) -> None:
    """Add a panel's part of the gradients by rows and bias; `states` (t, d) are the trained columns' inputs."""
    pulls = known.pulls
    assert pulls is not None
    for columns, exponentials, largest in panel.blocks:
        share = weights * pulls.share * torch.exp(largest - pulls.largest)
        if found.rows is not None:
            scaled = (states * share[:, None]).to(states.dtype)
            panel.buffers.add_product(found.rows[columns], exponentials.t(), scaled)
        if found.bias is not None:
            found.bias[columns] += torch.mv(exponentials.t().to(share.dtype), share)
    own = weights * pulls.own
    if found.rows is not None:
        found.rows.index_add_(0, targets, states * own[:, None])
    if found.bias is not None:
        found.bias.index_add_(0, targets, own)


def _take_smoothing(found: Gradients, states: Tensor, weights: Tensor, problem: Problem) -> None:
    """Label smoothing pulls every logit of a token alike: one row for the whole head."""
    share = weights * (problem.options.label_smoothing * problem.options.logit_scale / problem.vocabulary)
    if found.rows is not None:
        found.rows.sub_((states * share[:, None]).sum(0))
    if found.bias is not None:
        found.bias.sub_(share.sum())
