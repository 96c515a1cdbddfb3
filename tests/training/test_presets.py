"""Every preset of one device trains a tiny model and goes on from its checkpoint as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterhub_lite.adapter_format.manifest import read_record
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory import MEMORY_PRESETS, Machine, refusal

SINGLE = [name for name, preset in MEMORY_PRESETS.items() if preset.strategy == "single"]
SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-2}


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", SINGLE)
def test_it_trains_and_resumes(make_trainer: Any, tmp_path: Path, name: str) -> None:
    here = refusal(MEMORY_PRESETS[name], Machine.present())
    if here is not None:
        pytest.skip(f"{name}: {here}")
    settings = {**SAVING, "memory_preset": name, "max_steps": 8, "use_cpu": not torch.cuda.is_available()}
    whole = make_trainer("whole", **settings)
    assert whole.memory_choice.preset.name == name
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] * 0.95
    again = make_trainer("again", **settings, keywords=None)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert again.state.global_step == 8
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)
    record = whole.record()
    assert record.preset == name
    assert record.memory.predicted_bytes and "predicted" in str(whole.memory_report.line)


def test_a_whole_model_is_kept_as_a_base(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(memory_preset="full", learning_rate=1e-3)
    trainer.train()
    with pytest.raises(ConfigurationError, match="trains the base itself"):
        trainer.save_adapter(tmp_path / "adapter")
    trainer.save_model(str(tmp_path / "base"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name


def test_head_only_moves_the_head_alone(make_trainer: Any, tiny_base: Path) -> None:
    trainer = make_trainer(memory_preset="head-only", learning_rate=1e-2)
    trainer.train()
    before = dict(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).named_parameters())
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    # Tied: the embedding is the head.
    assert moved == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("arguments", "scaling", "rank"),
    [
        ({}, 2.0, 4),
        ({"use_rslora": True, "alpha": 8}, 4.0, 4),
        ({"use_dora": True}, 2.0, 4),
        ({"init_lora": "gaussian"}, 2.0, 4),
        ({"loraplus_lr_ratio": 16.0}, 2.0, 4),
    ],
    ids=["default", "rslora", "dora", "gaussian", "lora+"],
)
def test_variants_reach_peft_and_train(
    make_trainer: Any, tmp_path: Path, arguments: dict[str, Any], scaling: float, rank: int
) -> None:
    trainer = make_trainer(**{"alpha": None, **arguments})
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(scaling) and layer.r["default"] == rank
    trainer.train()
    folder = trainer.save_adapter(tmp_path / "adapter")
    assert read_record(folder) is not None
    config = trainer.model.active_peft_config
    assert (config.use_dora, config.use_rslora) == (
        arguments.get("use_dora", False),
        arguments.get("use_rslora", False),
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pissa_adapter_fits_the_untouched_base_and_resumes(
    make_trainer: Any, tmp_path: Path, tiny_base: Path, rslora: bool
) -> None:
    from peft import PeftModel

    settings = {**SAVING, "init_lora": "pissa", "use_rslora": rslora, "max_steps": 4}
    trainer = make_trainer(**settings)
    trainer.train()
    folder = trainer.save_adapter(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder).eval()
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        wanted = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, wanted, rtol=1e-3, atol=1e-3)
        with plain.disable_adapter():
            assert not torch.allclose(plain(tokens).logits, wanted, rtol=1e-2, atol=1e-2)
    again = make_trainer("again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again) == losses(trainer)


def test_lora_plus_gives_b_its_own_rate(make_trainer: Any) -> None:
    trainer = make_trainer(loraplus_lr_ratio=16.0, lr_scheduler_type="constant", warmup_steps=0)
    trainer.train()
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {
        ("lora_B" in named[id(p)]): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    assert rates[True] == pytest.approx(16 * rates[False])


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
    ],
    ids=str,
)
def test_names_of_targets(make_trainer: Any, wanted: Any, names: list[str]) -> None:
    trainer = make_trainer(target_modules=wanted)
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in trainer.model.named_parameters() if "lora_A" in name
    }
    assert sorted(adapted) == names
