"""Which implementation is taken, and the reason that the training record keeps."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.losses import (
    Head,
    LossChoice,
    LossOptions,
    causal_lm_loss,
    choose_loss,
    full_cross_entropy,
    head_of,
)
from adapterhub_lite.losses.choice import Situation, refusal
from adapterhub_lite.losses.kernels import KERNELS


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base)


def test_large_logits_take_tiles_and_say_why_not_the_others(model: Any) -> None:
    choice = choose_loss(model, tokens=10**5)
    assert choice.name == "tiled"
    assert [name for name, _ in choice.rejected] == ["cut_cross_entropy", "liger", "triton", "full"]
    record = choice.record()
    assert record["name"] == "tiled" and "GPU" in record["not liger"]
    assert all(isinstance(value, str) for value in record.values())


def test_few_logits_take_the_full_loss(model: Any) -> None:
    assert choose_loss(model, tokens=16).name == "full"


def test_a_name_that_cannot_run_is_refused_with_the_reason(model: Any) -> None:
    with pytest.raises(ConfigurationError, match="GPU"):
        choose_loss(model, tokens=16, prefer="liger")
    with pytest.raises(UnknownNameError, match="tiled"):
        choose_loss(model, tokens=16, prefer="tild")


@pytest.mark.parametrize("name", ["full", "tiled"])
def test_a_name_asked_for_is_taken_and_gives_the_same_loss(model: Any, name: str) -> None:
    choice = choose_loss(model, tokens=16, prefer=name)
    assert choice.name == name
    hidden, labels = torch.randn(2, 9, 32), torch.randint(272, (2, 9))
    labels[:, :4] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "token_weights": torch.rand(2, 9), "reduction": "mean"}
    loss = causal_lm_loss(head_of(model), hidden, labels, choice=choice, **options)
    torch.testing.assert_close(loss, causal_lm_loss(head_of(model), hidden, labels, **options))


@pytest.mark.parametrize("choice", [LossChoice("full", ""), LossChoice("tiled", "")])
def test_a_batch_without_labels_is_a_differentiable_zero(model: Any, choice: LossChoice) -> None:
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    loss = causal_lm_loss(head_of(model), hidden, torch.full((2, 9), -100), reduction="mean", choice=choice)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None and not hidden.grad.any()


class TestKernelRungs:
    """The rules of the Triton rungs, judged for a head said to be on a GPU; functions stand where kernels would."""

    @pytest.fixture
    def situation(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(Situation, "device", property(lambda self: torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        return lambda head, **options: Situation(head, 10**6, LossOptions(**options))

    @pytest.fixture
    def install(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Put a function in the place of a kernel that this machine cannot run."""

        def install(name: str, kernel: Any) -> None:
            package, attribute = KERNELS[name]
            module = ModuleType(package)
            setattr(module, attribute, kernel)
            monkeypatch.setitem(sys.modules, package, module)

        return install

    @pytest.mark.parametrize("rung", KERNELS)
    def test_an_import_error_is_reported(self, situation: Any, rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
        package = KERNELS[rung][0]
        monkeypatch.setitem(sys.modules, package, None)
        reason = refusal(rung, situation(Head(nn.Linear(8, 9, bias=False))))
        assert reason is not None and "Error" in reason and package.split(".")[0] in reason

    def test_what_a_kernel_does_not_do_is_named(self, situation: Any, install: Any) -> None:
        install("cut_cross_entropy", plain_kernel)
        refuse = partial(refusal, "cut_cross_entropy")
        plain = nn.Linear(8, 9, bias=False)
        assert refuse(situation(Head(plain))) is None
        assert refuse(situation(Head(plain, softcap=2.0))) is None
        assert "a bias" in refuse(situation(Head(nn.Linear(8, 9))))
        assert "logit scale" in refuse(situation(Head(plain, logit_scale=2.0)))
        assert "z-loss" in refuse(situation(Head(plain), z_loss=0.1))
        assert "gradient scaler" in refuse(situation(Head(plain.half())))

    def test_a_kernel_has_to_agree_with_the_tiles(self, situation: Any, install: Any) -> None:
        def forgets_the_cap(*tensors: Any, softcap: Any, **options: Any) -> Any:
            return plain_kernel(*tensors, softcap=None, **options)

        def rounds(hidden: Any, *rest: Any, **options: Any) -> Any:
            return plain_kernel(hidden + 0.01 * hidden.detach().abs(), *rest, **options)

        def breaks(*tensors: Any, **options: Any) -> Any:
            raise RuntimeError("no such instruction")

        refuse, head = partial(refusal, "cut_cross_entropy"), Head(nn.Linear(8, 9, bias=False), softcap=1.0)
        for kernel, reason in ((forgets_the_cap, "away"), (rounds, "away"), (breaks, "no such instruction")):
            install("cut_cross_entropy", kernel)
            assert reason in refuse(situation(head))
        head.weight.grad = None
        install("cut_cross_entropy", plain_kernel)
        assert refuse(situation(head)) is None and head.weight.grad is None

    @pytest.mark.parametrize("rung", KERNELS)
    @pytest.mark.parametrize("weighed", [False, True])
    @pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
    def test_its_losses_are_reduced_as_ours(self, install: Any, rung: str, weighed: bool, reduction: str) -> None:
        install("cut_cross_entropy", plain_kernel)
        install(
            "liger", lambda **options: lambda weight, hidden, targets: plain_kernel(hidden, weight, targets, **options)
        )
        head, labels = Head(nn.Linear(8, 9, bias=False)), torch.randint(9, (2, 7))
        labels[:, 3] = -100
        options = {"reduction": reduction, "token_weights": torch.rand(2, 7) if weighed else None}
        hidden = torch.randn(2, 7, 8)
        loss = causal_lm_loss(head, hidden, labels, choice=LossChoice(rung, ""), **options)
        torch.testing.assert_close(loss, causal_lm_loss(head, hidden, labels, **options))


def plain_kernel(hidden: Any, weight: Any, targets: Any, *, ignore_index: int, softcap: Any, reduction: str) -> Any:
    """What a kernel computes, by the full logits."""
    options = LossOptions(ignore_index=ignore_index, softcap=softcap, reduction=reduction)
    return full_cross_entropy(hidden, weight, targets, options)
