"""A plan says what it takes, why, and why nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError, UnknownNameError
from adapterhub_lite.memory import MEMORY_PRESETS, estimate_memory, plan_memory, refusal

GIB = 2**30


def test_plenty_takes_lora_in_bf16_at_the_batch_asked_for(small_config: Any, machine: Any) -> None:
    plan = plan_memory(small_config, batch_size=8, sequence_length=128, machine=machine(40))
    assert (plan.preset.name, plan.batch_size, plan.accumulation) == ("lora-bf16", 8, 1)
    assert plan.predicted.total <= 40 * GIB
    assert {r.preset for r in plan.rejected} == MEMORY_PRESETS.keys() - {"lora-bf16"}


@pytest.mark.parametrize(("gib", "world_size"), [(80, 1), (17.5, 1), (9, 1), (80, 2)])
def test_every_rejection_has_its_reason_and_its_figure(qwen_7b: Any, machine: Any, gib: float, world_size: int) -> None:
    """Whatever can run here is set beside the choice; the rest says what it would need elsewhere."""
    here = machine(gib, world_size=world_size)
    plan = plan_memory(qwen_7b, batch_size=8, sequence_length=1024, machine=here)
    assert {r.preset for r in plan.rejected} | {plan.preset.name} == MEMORY_PRESETS.keys()
    for rejection in plan.rejected:
        able = refusal(MEMORY_PRESETS[rejection.preset], here) is None
        assert (rejection.predicted is not None) == able, rejection.reason
        assert "GiB" in rejection.reason and able != ("would need" in rejection.reason), rejection.reason
        if rejection.predicted is not None:
            assert f"{rejection.predicted.total / GIB:.1f} GiB" in rejection.reason


def test_a_model_that_has_no_sdpa_or_runs_in_16_bits_alone_can_be_planned(machine: Any) -> None:
    from transformers import AutoConfig

    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    for kind, more in (("gemma2", {}), ("gpt_oss", {"num_local_experts": 4, "num_key_value_heads": 2})):
        config = AutoConfig.for_model(kind, **sizes, **more, intermediate_size=128)
        assert plan_memory(config, batch_size=2, sequence_length=64, machine=machine(8)).predicted.total > 0


@pytest.mark.parametrize(
    ("gib", "world_size", "expected"),
    [
        (80, 1, "lora-bf16"),
        (17.5, 1, "lora-bf16-gc"),
        (9, 1, "qlora-nf4-gc"),
        (80, 2, "ddp"),
        (12, 4, "fsdp"),
    ],
)
def test_a_7b_model_goes_down_the_ladder(
    qwen_7b: Any, machine: Any, gib: float, world_size: int, expected: str
) -> None:
    plan = plan_memory(qwen_7b, batch_size=8, sequence_length=1024, machine=machine(gib, world_size=world_size))
    assert plan.preset.name == expected
    assert plan.batch_size * plan.accumulation == 8
    assert all(r.reason for r in plan.rejected)
    needed = [r for r in plan.rejected if "GiB" in r.reason]
    assert expected == "lora-bf16" or expected == "ddp" or needed


def test_an_old_gpu_takes_fp16_and_says_why(small_config: Any, machine: Any) -> None:
    plan = plan_memory(small_config, batch_size=8, sequence_length=128, machine=machine(15, capability=(7, 5)))
    assert plan.preset.name == "lora-fp16"
    assert "compute capability" in next(r.reason for r in plan.rejected if r.preset == "lora-bf16")


def test_nothing_fits_says_what_comes_closest(qwen_7b: Any, machine: Any) -> None:
    with pytest.raises(OutOfMemoryError, match=r"the smallest, \S+, needs .* GiB"):
        plan_memory(qwen_7b, batch_size=8, sequence_length=1024, machine=machine(2))


def test_a_name_is_kept_and_only_rows_are_looked_for(qwen_7b: Any, machine: Any) -> None:
    plan = plan_memory(qwen_7b, batch_size=8, sequence_length=1024, machine=machine(17.5), preset="lora-bf16-gc")
    assert plan.preset.name == "lora-bf16-gc" and plan.batch_size < 8
    assert "asked for by name" in plan.described()


def test_a_name_that_cannot_run_is_refused(small_config: Any, machine: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs a GPU"):
        plan_memory(small_config, batch_size=1, sequence_length=8, machine=machine(4, device="cpu"), preset="lora-fp16")
    with pytest.raises(UnknownNameError, match="lora-bf16"):
        estimate_memory(small_config, "lora-bf61", batch_size=1, sequence_length=8)


def test_an_estimate_adds_up_and_grows_as_it_should(small_config: Any) -> None:
    def need(preset: str, **changed: Any) -> Any:
        return estimate_memory(small_config, preset, **{"batch_size": 4, "sequence_length": 128, **changed})

    plain = need("lora-bf16")
    assert plain.total == sum(plain.components.values())
    assert plain.components["weights"] == 2 * (plain.components["weights"] // 2)
    double = need("lora-bf16", batch_size=8)
    # The adapter's copies in the base's dtype do not grow with the rows.
    copies = plain.components["adapter"] // 2
    assert double.components["activations"] - copies == 2 * (plain.components["activations"] - copies)
    assert need("lora-bf16", rank=16).components["adapter"] == 2 * plain.components["adapter"]
    assert need("lora-fp32").components["weights"] == 2 * plain.components["weights"]
    order = ["lora-fp32", "lora-bf16", "lora-bf16-gc", "qlora-nf4-gc"]
    totals = [need(name).total for name in order]
    assert totals == sorted(totals, reverse=True)


def test_sums_of_accumulated_gradients_and_a_second_copy_for_other_processes_are_counted(small_config: Any) -> None:
    def need(preset: Any, **changed: Any) -> Any:
        # So many rows that activations are the worst moment.
        return estimate_memory(small_config, preset, **{"batch_size": 64, "sequence_length": 128, **changed}).components

    full = MEMORY_PRESETS["full"]
    weights = need(full)["weights"]
    # In fp32 beside fp32 copies of the weights, else as the weights are.
    assert need(full, accumulation=2)["gradients"] == 2 * weights
    assert need(replace(full, master_weights=False), accumulation=2)["gradients"] == weights
    assert need(full, world_size=2)["temporary"] == need(full)["temporary"] + weights


@pytest.mark.parametrize("name", sorted(MEMORY_PRESETS))
def test_every_preset_can_be_estimated(small_config: Any, name: str) -> None:
    world_size = 2 if MEMORY_PRESETS[name].strategy != "single" else 1
    found = estimate_memory(small_config, name, batch_size=2, sequence_length=64, world_size=world_size)
    assert found.total > 0 and min(found.components.values()) >= 0
    assert "GiB" in found.described()


def test_numbers_below_one_are_refused_together(small_config: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size is 0, rank is -1"):
        estimate_memory(small_config, "lora-bf16", batch_size=0, sequence_length=8, rank=-1)


def test_a_base_without_config_is_unknown() -> None:
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        estimate_memory("no-such-base", "lora-bf16", batch_size=1, sequence_length=8)
