"""The proof and the pre-flight leave nothing behind: with them and without, every optimizer comes out bit for bit the same."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import set_seed

from tests.training.habits.conftest import Bench, losses, weights

# Each by how a script names it; `optimizer_cls_and_kwargs` where transformers has no name for it.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("torch", {"optim": "adamw_torch"}),
    "fused AdamW": ("torch", {"optim": "adamw_torch_fused"}),
    "SGD": ("torch", {"optim": "sgd"}),
    "Adagrad": ("torch", {"optim": "adagrad"}),
    "RMSprop": ("torch", {"optim": "rmsprop"}),
    "Adafactor": ("torch", {"optim": "adafactor"}),
    "NAdam": ("torch", {"optimizer": (torch.optim.NAdam, {"lr": 1e-2})}),
    "ASGD": ("torch", {"optimizer": (torch.optim.ASGD, {"lr": 1e-2})}),
    "8-bit AdamW": ("bitsandbytes", {"optim": "adamw_8bit"}),
    "Lion": ("bitsandbytes", {"optim": "lion_32bit"}),
    "schedule-free AdamW": ("schedulefree", {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}),
    "schedule-free SGD": ("schedulefree", {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant"}),
    "Prodigy": ("prodigyopt", {"optimizer": ("prodigyopt.Prodigy", {"lr": 1.0}), "lr_scheduler_type": "constant"}),
}


def run(bench: Bench, checked: bool, given: dict[str, Any]) -> Any:
    arguments = {name: value for name, value in given.items() if name != "optimizer"}
    if "optimizer" in given:
        kind, settings = given["optimizer"]
        if isinstance(kind, str):
            module, _, name = kind.partition(".")
            kind = getattr(importlib.import_module(module), name)
        arguments["keywords"] = {"optimizer_cls_and_kwargs": (kind, settings)}
    model = bench.model(lora_dropout=0.1)
    trainer = bench.ours(model=model, preflight=checked, proof=checked, max_steps=4, **arguments)
    set_seed(7)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_never_knows(bench: Bench, name: str) -> None:
    package, given = OPTIMIZERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    plain, checked = run(bench, False, given), run(bench, True, given)
    assert losses(plain) == losses(checked)
    wanted, found = weights(plain), weights(checked)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    states = [trainer.optimizer.optimizer.state_dict() for trainer in (plain, checked)]
    groups = [[{k: v for k, v in group.items() if k != "params"} for group in one["param_groups"]] for one in states]
    assert repr(groups[0]) == repr(groups[1])


def test_a_warm_optimizer_goes_on(bench: Bench) -> None:
    model = bench.model()
    trained = [one for one in model.parameters() if one.requires_grad]
    warm = torch.optim.Adam(trained, lr=1e-2)
    for one in trained:
        one.grad = torch.ones_like(one)
    warm.step(), warm.zero_grad()
    schedule = torch.optim.lr_scheduler.ConstantLR(warm, 1.0)
    bench.ours(model=model, keywords={"optimizers": (warm, schedule)}).train()
    assert warm.state[trained[0]]["step"].item() == 1 + 3


def test_buffers_that_a_step_writes_are_put_back(bench: Bench) -> None:
    model = bench.model()
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.register_buffer("seen", torch.zeros(1))

    def write(module: Any, given: Any, made: Any) -> None:
        if module.training:
            module.seen.add_(1)

    norm.register_forward_hook(write)
    bench.ours(model=model, fast_lora=False).train()
    assert norm.seen.item() == 3
