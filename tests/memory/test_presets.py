"""The presets are what their names say, and the matrix of what is legal names one reason each time."""

import itertools
from typing import Any

import pytest
import torch

from adapterhub_lite.errors import UnknownNameError
from adapterhub_lite.memory import MEMORY_PRESETS, Machine, best_attention, find_preset, refusal

NAMES = (
    "full head-only lora-fp32 lora-fp16 lora-bf16 lora-bf16-gc lora-int8 qlora-nf4 qlora-nf4-gc qlora-nf4-paged "
    "ddp zero1 zero2 zero3 zero3-offload fsdp fsdp-qlora"
)


def test_the_names() -> None:
    assert " ".join(MEMORY_PRESETS) == NAMES
    with pytest.raises(UnknownNameError, match="Did you mean 'qlora-nf4'"):
        find_preset("qlora-nf")


def test_nf4_is_double_quantised_and_computes_in_bf16() -> None:
    config = find_preset("qlora-nf4").quantization_config()
    assert config.load_in_4bit and config.bnb_4bit_use_double_quant and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert find_preset("fsdp-qlora").quantization_config().bnb_4bit_quant_storage == torch.bfloat16
    assert find_preset("lora-int8").quantization_config().load_in_8bit
    assert find_preset("lora-bf16").quantization_config() is None


def test_checkpointing_is_reentrant_only_under_zero3() -> None:
    for preset in MEMORY_PRESETS.values():
        fields = preset.training_arguments()
        if preset.gradient_checkpointing:
            assert fields["activation_checkpointing_kwargs"] == {"use_reentrant": preset.strategy == "zero3"}
        else:
            assert "activation_checkpointing_kwargs" not in fields


def test_zero_stages_reach_deepspeed() -> None:
    for name, stage in (("zero1", 1), ("zero2", 2), ("zero3", 3)):
        assert find_preset(name).training_arguments()["deepspeed"]["zero_optimization"]["stage"] == stage
    offloaded = find_preset("zero3-offload").training_arguments()["deepspeed"]["zero_optimization"]
    assert offloaded["offload_param"]["device"] == offloaded["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("name", [n for n, p in MEMORY_PRESETS.items() if p.strategy == "single"])
def test_the_fields_are_training_arguments(name: str, tmp_path: Any) -> None:
    from transformers import TrainingArguments

    preset = find_preset(name)
    if preset.mixed_precision == "fp16":
        pytest.skip("transformers refuses fp16 mixed precision without a GPU")
    made = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **preset.training_arguments())
    assert made.activation_checkpointing == preset.gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("lora-bf16", {"capability": (7, 5)}, "compute capability"),
        ("lora-fp16", {"device": "cpu"}, "needs a GPU"),
        ("qlora-nf4", {"packages": frozenset()}, "bitsandbytes is not installed"),
        ("zero2", {"world_size": 1}, "splits over processes"),
        ("zero2", {"world_size": 2, "packages": frozenset()}, "deepspeed is not installed"),
        ("lora-bf16", {"world_size": 2}, "for one process"),
        ("fsdp", {"world_size": 2, "device": "cpu"}, "leaves FSDP out"),
        ("zero3-offload", {"device": "cpu"}, "no device to leave"),
    ],
)
def test_what_is_not_legal_names_the_reason(machine: Any, name: str, changed: dict[str, Any], reason: str) -> None:
    assert reason in str(refusal(find_preset(name), machine(40, **changed)))


def test_what_is_legal_is_not_refused(machine: Any) -> None:
    for preset in MEMORY_PRESETS.values():
        world = 1 if preset.strategy == "single" else 2
        assert refusal(preset, machine(40, world_size=world)) is None
    for name in ("full", "lora-bf16", "lora-int8", "qlora-nf4-paged"):
        assert refusal(find_preset(name), machine(8, device="cpu", capability=None)) is None


# Of each preset: c a CPU, o a GPU without bf16, g a newer one; 1 or 2 processes; Q a base that is quantised already.
MATRIX = {
    "full": "c1 g1 c2 g2",
    "head-only": "c1 g1 c2 g2 c1Q g1Q c2Q g2Q",
    "lora-fp32": "c1 o1 g1 c1Q o1Q g1Q",
    "lora-fp16": "o1 g1 o1Q g1Q",
    "lora-bf16": "c1 g1 c1Q g1Q",
    "lora-bf16-gc": "c1 g1 c1Q g1Q",
    "lora-int8": "c1 g1",
    "qlora-nf4": "c1 g1",
    "qlora-nf4-gc": "c1 g1",
    "qlora-nf4-paged": "c1 g1",
    "ddp": "c2 g2 c2Q g2Q",
    "zero1": "c2 g2 c2Q g2Q",
    "zero2": "c2 g2 c2Q g2Q",
    "zero3": "c2 g2 c2Q g2Q",
    "zero3-offload": "g1 g2 g1Q g2Q",
    "fsdp": "g2 g2Q",
    "fsdp-qlora": "g2",
}


def test_the_whole_matrix(machine: Any) -> None:
    """Preset x device x processes x kind of model: what is legal, and one clause for everything else."""
    machines = {
        "c": {"device": "cpu", "capability": None},
        "o": {"capability": (7, 5)},
        "g": {"capability": (8, 0)},
    }
    for name, legal in MATRIX.items():
        for kind, processes, quantized in itertools.product(machines, (1, 2), (False, True)):
            here = machine(40, world_size=processes, **machines[kind])
            reason = refusal(find_preset(name), here, model_quantized=quantized)
            cell = f"{kind}{processes}{'Q' * quantized}"
            assert (reason is None) == (cell in legal.split()), f"{name} {cell}: {reason}"
            assert reason is None or (reason and "." not in reason.replace("8.0", ""))
    assert MATRIX.keys() == MEMORY_PRESETS.keys()


def test_a_quantised_base_is_not_quantised_again(machine: Any) -> None:
    assert "already" in str(refusal(find_preset("qlora-nf4"), machine(40), model_quantized=True))
    assert "whole" in str(refusal(find_preset("full"), machine(40), model_quantized=True))


def test_attention_says_which_and_why(machine: Any) -> None:
    bf16, both = find_preset("lora-bf16"), frozenset({"sdpa", "flash_attention_2"})
    assert best_attention(bf16, machine(40), both)[0] == "flash_attention_2"
    for changed, reason in (
        ({"device": "cpu"}, "GPU"),
        ({"capability": (7, 5)}, "capability"),
        ({"packages": frozenset()}, "not installed"),
    ):
        name, why = best_attention(bf16, machine(40, **changed), both)
        assert name == "sdpa" and reason in why
    assert best_attention(find_preset("lora-fp32"), machine(40), both)[0] == "sdpa"
    assert best_attention(bf16, machine(40), frozenset({"sdpa"})) == ("sdpa", "the model has no flash attention")
    assert best_attention(bf16, machine(40, device="cpu"), frozenset({"flash_attention_2"}))[0] == "eager"


def test_the_present_machine_can_be_described() -> None:
    here = Machine.present()
    assert here.memory_bytes > 0 and here.device in ("cpu", "cuda")
    assert Machine.present(memory_bytes=5).memory_bytes == 5
