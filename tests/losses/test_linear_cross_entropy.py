"""Law 1: the logits-free loss equals the reference, in value and in every gradient."""

import pytest
import torch
from torch.nn import functional as F

from adapterhub_lite.errors import UsageError
from adapterhub_lite.losses import linear_cross_entropy


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 64, None])
def test_equals_cross_entropy_on_the_full_logits(reduction: str, chunk_tokens: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(13, 8), torch.randn(31, 8), torch.randn(31)
    targets = torch.randint(31, (13,))
    targets[::3] = -100
    ours = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    theirs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(ours[0], ours[1], targets, bias=ours[2], reduction=reduction, chunk_tokens=chunk_tokens)
    truth = F.cross_entropy(F.linear(*theirs), targets, reduction=reduction)
    torch.testing.assert_close(loss, truth)
    loss.sum().backward()
    truth.sum().backward()
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, their.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_targets_ignored_is_a_differentiable_zero(reduction: str) -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[0, 9\)"):
        linear_cross_entropy(torch.randn(2, 8), torch.randn(9, 8), torch.tensor([1, 9]))
