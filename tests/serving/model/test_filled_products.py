"""Products are filled up to a few numbers of rows, and what fills them up changes nothing."""

import pytest
import torch
from torch import nn

from adapterhub_lite.serving.model.forward_lean import FusedLinear, filled_tokens


def test_there_are_few_sizes_and_none_is_too_small() -> None:
    sizes = [filled_tokens(tokens) for tokens in range(1, 1025)]
    assert all(tokens <= size <= max(4, tokens * 1.5) for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 48


@pytest.mark.parametrize("bias", [False, True])
def test_filling_up_changes_nothing(bias: bool) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(64, 48, bias=bias), "b": nn.Linear(64, 16, bias=bias)}
    plain = [one.bfloat16() for one in layers.values()]
    x = torch.randn(70, 64).bfloat16()
    with torch.inference_mode():
        wanted = torch.cat([one(x).float() for one in plain], -1)
        fused = FusedLinear(layers)
        for tokens in (1, 2, 3, 5, 16, 17, 33, 64, 65, 70):
            got = fused(x[:tokens])
            assert got.shape == (tokens, 64) and got.is_contiguous()
            torch.testing.assert_close(got.float(), wanted[:tokens], rtol=2e-2, atol=2e-2)
