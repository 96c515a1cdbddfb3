"""Auto plans, a name is kept, what was set by hand wins, and a contradiction is one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError, UnknownNameError
from adapterhub_lite.memory.calibration import read_calibration
from adapterhub_lite.training import AdapterTrainingArguments
from adapterhub_lite.training.run.memory_choice import choose_memory


def test_auto_is_the_default_and_plans(make_trainer: Any) -> None:
    assert AdapterTrainingArguments(output_dir="x", use_cpu=True).memory_preset == "auto"
    trainer = make_trainer(memory_preset="auto", preflight=False)
    choice = trainer.memory_choice
    assert choice.planned and choice.preset.name == "lora-bf16" and choice.predicted.total > 0
    assert next(trainer.model.get_base_model().parameters()).dtype == torch.bfloat16
    trainer.train()
    record = trainer.record()
    assert record.preset == "lora-bf16" and record.memory.predicted_bytes == choice.predicted.total
    assert "fits into" in record.loss_backend["memory"] and "sdpa" in record.loss_backend["attention"]


def arguments(**given: Any) -> AdapterTrainingArguments:
    return AdapterTrainingArguments(output_dir="x", use_cpu=True, **given)


def test_the_configuration_that_comes_along_is_what_is_planned(tiny_base: Path) -> None:
    args, config = (
        arguments(memory_preset="lora-fp32"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    own, handed = choose_memory(tiny_base, args, [20]), choose_memory(tiny_base, args, [20], adapter=config)
    assert own.uncorrected is not None and handed.uncorrected is not None
    # Two layers of 32 to 32 with rank 4, and a head of 272 x 32.
    assert handed.uncorrected.components["adapter"] == 4 * (2 * 2 * 4 * 32 + 272 * 32)
    assert handed.uncorrected.components["loss"] > own.uncorrected.components["loss"]


def test_too_little_memory_splits_the_batch_and_keeps_the_total(tiny_base: Path, small_machine: Any) -> None:
    args = arguments(per_device_train_batch_size=512, gradient_accumulation_steps=2)
    lengths = [1000] * 600
    plenty = choose_memory(tiny_base, args, lengths)
    assert plenty.accumulation == 1
    small_machine(plenty.predicted.total - 0.4 * plenty.predicted.components["activations"])
    choice = choose_memory(tiny_base, args, lengths)
    made = choice.applied(args)
    assert made.per_device_train_batch_size == 256 and made.gradient_accumulation_steps == 4
    assert args.per_device_train_batch_size == 512, "the user's own arguments are left alone"
    assert "keeps the 512 asked for" in " ".join(choice.reasons)
    small_machine(1 << 20)
    with pytest.raises(OutOfMemoryError, match="No memory preset fits"):
        choose_memory(tiny_base, args, lengths)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function (bytes): from now on this machine has that much memory free."""

    def shrink(size: float) -> None:
        monkeypatch.setattr("adapterhub_lite.memory.presets.available_memory", lambda: int(size))

    return shrink


def test_the_rows_decide_not_the_limit(tiny_base: Path) -> None:
    def need(lengths: list[int], **given: Any) -> int:
        choice = choose_memory(tiny_base, arguments(**given), lengths)
        return int(choice.predicted.components["activations"])

    short, long = need([10] * 40), need([10] * 39 + [400])
    assert short < long < need([400] * 40)
    # Padded, one long row makes the whole batch long.
    assert need([10] * 39 + [400], padding_free=False) == need([400] * 40)
    assert need([]) > need([400] * 40)


def test_what_is_set_by_hand_wins(make_trainer: Any) -> None:
    by_hand = make_trainer(memory_preset="lora-bf16", activation_checkpointing=True, optim="sgd", base_dtype="float32")
    assert by_hand.args.activation_checkpointing and by_hand.args.optim == "sgd"
    assert next(by_hand.model.get_base_model().parameters()).dtype == torch.float32
    assert "activation_checkpointing was set by hand" in by_hand.memory_choice.reasons
    kwargs = {"use_reentrant": True}
    kept = make_trainer("kept", memory_preset="lora-bf16-gc", activation_checkpointing_kwargs=kwargs, bf16=True)
    assert kept.args.activation_checkpointing_kwargs == kwargs and kept.args.bf16
    off = make_trainer("off", memory_preset="lora-bf16-gc", activation_checkpointing=False)
    assert not off.args.activation_checkpointing and not off.memory_choice.preset.gradient_checkpointing
    on = make_trainer("on", memory_preset="lora-bf16-gc")
    assert on.args.activation_checkpointing and on.args.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"memory_preset": "lora-fp16"}, "loss scaling in fp16 needs a GPU"),
        ({"memory_preset": "zero2"}, "it splits over processes, and there is one"),
        ({"memory_preset": "full", "use_dora": True}, "it trains no LoRA, and an option of LoRA was given"),
        ({"memory_preset": "qlora-nf4", "base_dtype": "float32"}, "it packs the weights, and base_dtype was given"),
        ({"memory_preset": "qlora-nf4", "init_lora": "pissa"}, "PiSSA takes the weights apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_contradiction_is_one_sentence(make_trainer: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_trainer(**given)
    text = str(caught.value)
    assert words in text and text.count(".") == 1 and "\n" not in text


def test_a_model_without_sdpa_is_trained_with_eager_attention(
    make_trainer: Any, tmp_path: Path, byte_tokenizer: Any
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=272, num_key_value_heads=2, head_dim=8, pad_token_id=0, **sizes)
    base = tmp_path / "gemma2"
    Gemma2ForCausalLM(config).save_pretrained(base)
    byte_tokenizer.save_pretrained(base)
    trainer = make_trainer(model=base, memory_preset="auto")
    assert trainer.memory_choice.attention.startswith("eager: ")
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    assert trainer.record().memory.predicted_bytes


def test_no_such_preset_names_the_nearest(make_trainer: Any) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lora-bf16'"):
        make_trainer(memory_preset="lora-bf61")


def test_a_model_in_memory_keeps_its_dtype_and_refuses_another(
    make_trainer: Any, tiny_base: Path, byte_tokenizer: Any
) -> None:
    keywords = {"processing_class": byte_tokenizer}
    trainer = make_trainer(model=load_base_model(tiny_base), memory_preset="auto", keywords=keywords)
    assert trainer.memory_choice.preset.name == "lora-fp32"
    assert trainer.memory_choice.attention == "sdpa: that of the model given"
    half = load_base_model(tiny_base, dtype=torch.bfloat16)
    assert (
        make_trainer("half", model=half, memory_preset="auto", keywords=keywords).memory_choice.preset.name
        == "lora-bf16"
    )
    with pytest.raises(ConfigurationError, match="the model given is in memory already, in bfloat16"):
        make_trainer(
            model=load_base_model(tiny_base, dtype=torch.bfloat16), memory_preset="qlora-nf4", keywords=keywords
        )
    odd = load_base_model(tiny_base, dtype=torch.float64)
    assert (
        make_trainer("odd", model=odd, memory_preset="auto", keywords=keywords).memory_choice.preset.dtype == "float64"
    )


def test_predicted_and_measured_are_said_recorded_and_learned_from(make_trainer: Any, home: Path) -> None:
    trainer = make_trainer(memory_preset="auto")
    said: list[str] = []
    trainer.memory_report.say = said.append
    seen: list[int] = []
    trainer.memory_report.say = lambda line: (said.append(line), seen.append(trainer.state.global_step))
    trainer.train()
    assert seen == [2] and "GiB predicted" in said[0] and "GiB measured" in said[0]
    (run,) = read_calibration(home).runs
    assert run.preset == "lora-bf16" and run.measured <= trainer.record().memory.measured_peak_bytes
    # The next run is told what this one measured.
    again = make_trainer("again", memory_preset="auto")
    assert (
        again.memory_choice.predicted.components["overhead"] != again.memory_choice.uncorrected.components["overhead"]
    )
