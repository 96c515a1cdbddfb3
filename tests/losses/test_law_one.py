"""Law 1 over sizes, masks, options and dtypes: equal in fp32, and no further from the truth in bf16 and fp16."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.losses import LossOptions
from adapterhub_lite.losses.tiled import tiled_cross_entropy

OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "softcap": st.sampled_from([None, 2.0, 30.0]),
        "logit_scale": st.sampled_from([1.0, 0.25, 3.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 0.01]),
        "ignore_index": st.sampled_from([-100, 0, -1]),
        "chunk_tokens": st.sampled_from([None, 1, 3, 1000]),
    }
)
SIZES = st.tuples(st.integers(1, 23), st.integers(2, 47), st.integers(1, 9))
TILES = st.tuples(st.integers(1, 24), st.integers(1, 48))
LAW = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TRAINED = {False: ("hidden",), True: ("hidden", "weight", "bias")}


@LAW
@given(
    seed=st.integers(0, 10**6), size=SIZES, tile=TILES, masked=st.sampled_from([0.0, 0.4, 0.9]),
    bias=st.booleans(), weights=st.booleans(), options=OPTIONS,
)  # fmt: skip
def test_fp32_equals_the_full_logits(
    case: Any, small_tiles: Any, head_trained: bool, seed: int, size: Any, tile: Any, masked: float,
    bias: bool, weights: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    problem = case.random(
        seed, *size, masked=masked, bias=bias, weights=weights, trained=TRAINED[head_trained], **options
    )
    with small_tiles(*tile):
        ours = problem.run(tiled=True)
    truth = problem.run(tiled=False)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0], ids=["flat", "usual", "confident"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 10.0},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01, "logit_scale": 0.25},
        {"softcap": 10.0, "label_smoothing": 0.1, "reduction": "none"},
    ],
    ids=["plain", "softcap", "smoothing", "z-loss", "both"],
)
def test_half_precision_is_no_further_from_the_truth(
    case: Any, small_tiles: Any, head_trained: bool, spread: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The truth is fp64 on the same rounded inputs; distances are norms over all elements."""
    problem = case.random(0, 1500, 3000, 32, bias=True, spread=spread, trained=TRAINED[head_trained], **options)
    problem = problem.to(dtype)
    truth = problem.to(torch.float64).run(tiled=False)
    naive = problem.run(tiled=False)
    with small_tiles(500, 700):
        ours = problem.run(tiled=True)
    for name, value in truth.items():
        our_error, naive_error = (float((x[name].double() - value).norm()) for x in (ours, naive))
        # A scalar's naive error may be small by luck; what a single element is allowed is one rounding of a logit.
        luck = torch.finfo(dtype).eps * float(value.norm()) * 0.05 if name == "loss" else 0.0
        assert our_error <= naive_error * 1.05 + luck, f"{name}: {our_error} > {naive_error}"


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "mean", "softcap": 1.5},
        {"reduction": "none", "label_smoothing": 0.2, "softcap": 1.5},
        {"reduction": "sum", "z_loss": 0.1, "logit_scale": 0.5, "label_smoothing": 0.2},
        {"reduction": "none", "z_loss": 0.1, "logit_scale": 0.5},
    ],
)
def test_gradcheck(case: Any, small_tiles: Any, head_trained: bool, options: dict[str, Any]) -> None:
    problem = case.random(3, 7, 11, 4, bias=True, weights=True, **options).to(torch.float64)
    leaves = [problem.hidden.requires_grad_()]
    if head_trained:
        leaves += [problem.weight.requires_grad_(), problem.bias.requires_grad_()]

    def loss(*_: Any) -> Any:
        return tiled_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.options,
            bias=problem.bias,
            token_weights=problem.token_weights,
        )

    with small_tiles(3, 4):
        assert torch.autograd.gradcheck(loss, leaves)


def test_a_confident_token_keeps_its_small_gradient(case: Any, head_trained: bool) -> None:
    """With p = 1 - 1e-4 in bf16, p - 1 must not be made from a rounded p."""
    weight = torch.eye(8)
    problem = case(
        torch.tensor([[11.0] + [0.0] * 7]), weight, torch.tensor([0]), None, None, LossOptions(), TRAINED[head_trained]
    ).to(torch.bfloat16)
    truth = problem.to(torch.float64).run(tiled=False)["hidden"]
    ours = problem.run(tiled=True)["hidden"].double()
    assert 0 < float(truth.norm()) < 1e-3
    assert float((ours - truth).norm()) < 0.01 * float(truth.norm())


def test_backward_twice_gives_twice_the_gradient(case: Any, head_trained: bool) -> None:
    problem = case.random(5, 9, 20, 6)
    hidden = problem.hidden.requires_grad_()
    problem.weight.requires_grad_(head_trained)
    loss = tiled_cross_entropy(hidden, problem.weight, problem.targets, problem.options)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once)


def test_no_gradient_is_kept_when_none_is_wanted(case: Any) -> None:
    problem = case.random(5, 9, 20, 6)
    with torch.no_grad():
        loss = tiled_cross_entropy(problem.hidden.requires_grad_(), problem.weight, problem.targets, problem.options)
    assert not loss.requires_grad


def test_autocast_takes_the_products_in_its_dtype(case: Any) -> None:
    problem = case.random(5, 9, 20, 6)
    hidden = problem.hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiled_cross_entropy(hidden, problem.weight, problem.targets, problem.options)
    loss.backward()
    problem.trained = ("hidden",)
    truth = problem.to(torch.bfloat16).run(tiled=True)
    torch.testing.assert_close(loss.detach(), truth["loss"])
    torch.testing.assert_close(hidden.grad, truth["hidden"].float())


class TestScaledGradients:
    """fp16 with a gradient scaler: the factor has to come before the rounding."""

    SCALE = 2.0**16

    @pytest.fixture
    def faint(self, case: Any) -> Any:
        """Confident tokens, whose gradients are near 1e-9: below the smallest fp16 number, 6e-8."""
        problem = case.random(1, 40, 300, 64, masked=0.0, reduction="sum")
        problem.weight = torch.nn.functional.normalize(problem.weight)
        problem.hidden = 36 * problem.weight[problem.targets]
        return problem.to(torch.float16)

    def test_small_gradients_survive_fp16(self, faint: Any, head_trained: bool) -> None:
        faint.trained = ("hidden", "weight") if head_trained else ("hidden",)
        truth = faint.to(torch.float64).run(tiled=False)
        scaled = faint.run(tiled=True, upstream=self.SCALE)
        for name in set(truth) - {"loss"}:
            assert float(truth[name].abs().median()) < 6e-8
            unscaled = scaled[name].double() / self.SCALE
            error = float((unscaled - truth[name]).norm() / truth[name].norm())
            assert error < 0.02, f"{name}: {error}"

    def test_rounding_before_scaling_would_lose_them(self, faint: Any) -> None:
        """The guard itself: what this room must never do is seen to fail by the same measure."""
        truth = faint.to(torch.float64).run(tiled=False)["hidden"]
        rounded_first = (truth.to(torch.float16) * self.SCALE).double() / self.SCALE
        assert float((rounded_first - truth).norm() / truth.norm()) > 0.1


def test_logits_that_lie_far_apart_lose_nothing(case: Any, head_trained: bool) -> None:
    """Exponents below -80 are cut off; the loss and its gradients must not notice."""
    problem = case.random(2, 12, 40, 6, spread=300.0, trained=TRAINED[head_trained])
    ours, truth = problem.run(tiled=True), problem.run(tiled=False)
    for name, value in truth.items():
        # fp32 logits near 1000 are themselves rounded by 6e-5.
        torch.testing.assert_close(ours[name], value, rtol=2e-4, atol=1e-3)
