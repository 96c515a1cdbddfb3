"""Weights that are trained in 16 bits are stepped in fp32, by any optimizer, and go on exactly where they stopped."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from adapterhub_lite.errors import IntegrityError
from adapterhub_lite.training.model.master_weights import MASTERS_FILE, MasterWeights, masters_of

WHOLE: dict[str, Any] = {
    "memory_preset": "full",
    "learning_rate": 1e-4,
    "max_steps": 6,
    "save_steps": 2,
    "save_strategy": "steps",
}
# From the first step on: with a rate of 0 a pre-flight would have nothing to undo.
WHOLE |= {"warmup_steps": 0}


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def masters(trainer: Any) -> dict[str, Tensor]:
    copies = {id(weight): master.detach().clone() for weight, master in trainer.masters.pairs}
    return {name: copies[id(parameter)] for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True),
        lambda params: torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 1e-4}], lr=1e-5),
        lambda params: torch.optim.Adafactor(params, lr=1e-4),
        lambda params: torch.optim.RMSprop(params, lr=1e-5, centered=True),
    ],
    ids=["sgd", "adamw", "adafactor", "rmsprop"],
)
def test_it_steps_as_an_optimizer_of_fp32_weights_does(make: Any) -> None:
    torch.manual_seed(0)
    begun = [torch.randn(7, 5).bfloat16(), torch.randn(5).bfloat16()]
    narrow = [torch.nn.Parameter(tensor.clone()) for tensor in begun]
    wide = [torch.nn.Parameter(tensor.float()) for tensor in begun]
    ours, reference = make(narrow), make(wide)
    kept = MasterWeights.put_into(ours)
    assert MasterWeights.put_into(ours) is kept and masters_of(ours) is kept
    for _ in range(20):
        for weight, other in zip(narrow, wide, strict=True):
            weight.grad = torch.randn(weight.shape).bfloat16()
            other.grad = weight.grad.float()
        ours.step()
        reference.step()
    for (weight, master), other in zip(kept.pairs, wide, strict=True):
        torch.testing.assert_close(master, other, rtol=0, atol=0)
        assert torch.equal(weight, other.bfloat16())


def test_a_small_step_is_not_lost() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    MasterWeights.put_into(optimizer)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == [torch.tensor(0.9).bfloat16().item()] * 4


def test_what_others_write_into_a_weight_counts() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    (_, master), *_ = MasterWeights.put_into(optimizer).pairs
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.no_grad():
        weight[1] = 3.0
    optimizer.step()
    torch.testing.assert_close(master.detach(), torch.tensor([0.998, 2.999]))


class TwoPoints(torch.optim.SGD):
    """Evaluates at another point than it trains at, as schedule-free optimizers do."""

    @torch.no_grad()
    def eval(self) -> None:
        self.param_groups[0]["params"][0].mul_(0.5)

    @torch.no_grad()
    def train(self) -> None:
        self.param_groups[0]["params"][0].mul_(2.0)


def test_weights_follow_the_optimizer_into_evaluation_and_back() -> None:
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = TwoPoints([weight], lr=1e-3)
    (_, master), *_ = MasterWeights.put_into(optimizer).pairs
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.4995))
    optimizer.train()
    torch.testing.assert_close(master.detach(), torch.full((8,), 0.999))


def test_a_resumed_run_goes_on_bit_for_bit(make_trainer: Any, tmp_path: Path) -> None:
    whole = make_trainer("whole", **WHOLE)
    whole.train()
    # What was done in the pre-flight is undone in the copies too.
    bold = make_trainer("bold", **WHOLE, preflight=False)
    bold.train()
    assert all(torch.equal(masters(bold)[name], tensor) for name, tensor in masters(whole).items())
    again = make_trainer("again", **WHOLE)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(masters(again)[name], tensor) for name, tensor in masters(whole).items())
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(again).items())


def test_a_checkpoint_without_copies_begins_at_its_weights(make_trainer: Any, tmp_path: Path) -> None:
    plain = make_trainer("plain", **WHOLE, master_weights=False)
    plain.train()
    assert plain.masters is None and not (tmp_path / "plain" / "checkpoint-6" / MASTERS_FILE).exists()
    going_on = make_trainer("going-on", **{**WHOLE, "max_steps": 7})
    going_on.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-6"))
    assert going_on.state.global_step == 7 and len(going_on.masters.pairs) > 1


def test_copies_of_other_weights_are_refused(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer("first", **WHOLE, seed=1).train()
    make_trainer("second", **{**WHOLE, "learning_rate": 1e-2}).train()
    mixed = tmp_path / "second" / "checkpoint-6"
    shutil.copy(tmp_path / "first" / "checkpoint-6" / MASTERS_FILE, mixed)
    (mixed / "hashes.json").unlink()
    with pytest.raises(IntegrityError, match="fp32 copy"):
        make_trainer("third", **{**WHOLE, "max_steps": 8}).train(resume_from_checkpoint=str(mixed))


def test_the_sum_of_accumulated_gradients_is_rounded_once() -> None:
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    kept = MasterWeights.put_into(torch.optim.SGD([weight], lr=1e-3))
    last = False
    for _ in range(2):
        kept.sum_in_fp32(lambda: last)
    parts = torch.rand(200, 64).bfloat16()
    for part in parts:
        last = part is parts[-1] or bool(torch.equal(part, parts[-1]))
        (weight * part).sum().backward()
        assert (weight.grad is None) != last
    assert weight.grad is not None and torch.equal(weight.grad, parts.float().sum(0).bfloat16())
    # In bf16, what is below half a unit of the sum's last place is lost.
    lossy = torch.zeros(64, dtype=torch.bfloat16)
    for part in parts:
        lossy += part
    assert not torch.equal(lossy, weight.grad)


def test_a_sum_that_was_broken_off_is_forgotten() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    kept = MasterWeights.put_into(torch.optim.SGD([weight], lr=1e-3))
    last = False
    kept.sum_in_fp32(lambda: last)
    weight.sum().backward()
    kept.sum_in_fp32(lambda: last)
    last = True
    weight.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1.0] * 4
    kept.sum_no_more()
    last = False
    weight.sum().backward()
    assert weight.grad.tolist() == [2.0] * 4


class Gradients(TrainerCallback):
    """Keeps what the backward passes of a step gave, one by one, and the gradient that is stepped with."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}
        self.whole: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.parts.clear()
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                parameter.register_hook(partial(self.hear, name))

    def hear(self, name: str, gradient: Tensor) -> None:
        self.parts.setdefault(name, []).append(gradient.detach().clone())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_run_sums_its_accumulated_batches_in_fp32(make_trainer: Any) -> None:
    heard = Gradients()
    settings = {**WHOLE, "max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    trainer = make_trainer("sums", **settings, max_grad_norm=0.0, keywords={"callbacks": [heard]})
    trainer.train()
    assert len(heard.parts) == len(heard.whole) > 10
    for name, parts in heard.parts.items():
        assert len(parts) == 8
        assert torch.equal(heard.whole[name], torch.stack(parts).float().cumsum(0)[-1].bfloat16()), name


def test_small_steps_add_up_in_a_run_with_accumulation(make_trainer: Any) -> None:
    settings = {"memory_preset": "full", "learning_rate": 1e-5, "max_steps": 12, "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 0}
    reference = make_trainer("wide", **settings, base_dtype="float32")
    ours = make_trainer("ours", **settings)
    lossy = make_trainer("lossy", **settings, master_weights=False)
    began, began_wide = weights(ours), weights(reference)
    for trainer in (reference, ours, lossy):
        trainer.train()
    true = {name: tensor - began_wide[name] for name, tensor in weights(reference).items()}
    names = [name for name, parameter in ours.model.named_parameters() if parameter.ndim > 1]
    assert not reference.masters.pairs and len(ours.masters.pairs) == len(began)
    found = {name: master - began[name].float() for name, master in masters(ours).items()}
    kept = {name: tensor.float() - began[name].float() for name, tensor in weights(lossy).items()}

    def error(moved: dict[str, Tensor]) -> float:
        wrong = sum(float((moved[name] - true[name]).square().sum()) for name in names)
        return (wrong / sum(float(true[name].square().sum()) for name in names)) ** 0.5

    # bf16 gradients alone, and the loss of what is below half a unit of a weight's last place.
    assert error(found) < 0.4 < 0.6 < error(kept)
