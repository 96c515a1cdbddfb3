"""What stops a run before or while it goes: the output folder, memory, a NaN, a signal."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel, TrainerCallback

from adapterhub_lite.errors import ConfigurationError, NonFiniteLossError, OutOfMemoryError
from adapterhub_lite.training import AdapterTrainingArguments
from adapterhub_lite.training.run.checks import fly, longest_rows, nothing_happened
from adapterhub_lite.training.run.guard import forget_after


class At(TrainerCallback):
    """Does something at the beginning of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def test_an_output_folder_that_is_not_empty_is_refused_and_left_alone(make_trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"not empty \(precious.txt\)"):
        make_trainer().train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_what_a_run_killed_before_its_first_checkpoint_left_is_no_hindrance(make_trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / ".writing" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 98765.5}\n')
    make_trainer().train()
    assert "98765.5" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not (tmp_path / "run" / ".writing").exists()


def test_a_trainer_may_train_again(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_nan_loss_stops_at_that_step_names_the_batch_and_keeps_the_checkpoint(
    make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=6)

    def poison() -> None:
        with torch.no_grad():
            trainer.model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.fill_(float("nan"))

    trainer.add_callback(At(4, poison))
    with pytest.raises(NonFiniteLossError, match=r"became nan at step 4, in the batch that begins '<\|im_start\|>user"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_trainer(save_strategy="steps", save_steps=2, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_sigterm_saves_then_stops(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=10)
    trainer.add_callback(At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.guard.stop_asked
    assert (tmp_path / "run" / "checkpoint-3" / "hashes.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_longest_batch_flies_first_and_leaves_no_trace(make_trainer: Any) -> None:
    plain = make_trainer("plain", preflight=False)
    flown = make_trainer("flown")
    seen = []
    flown.model.get_base_model().model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    plain.train(), flown.train()
    lengths = sorted(flown.train_dataset["length"], reverse=True)
    # The first two passes prove the loss on one row, in two ways.
    assert seen[2] == sum(lengths[:4])
    assert plain.state.log_history[:4] and [line["loss"] for line in plain.state.log_history[:4]] == [
        line["loss"] for line in flown.state.log_history[:4]
    ]


def test_out_of_memory_says_what_would_fit() -> None:
    rows = [{"input_ids": [1] * 50}] * 16

    def step(batch: list[Any]) -> None:
        if len(batch) > 5:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    with pytest.raises(OutOfMemoryError, match=r"16 rows of up to 50 tokens.*per_device_train_batch_size=4.*steps=8"):
        fly(step, rows, 2, "cpu")
    with pytest.raises(OutOfMemoryError, match="Not even one row does"):
        fly(lambda batch: step([None] * 6), rows, 2, "cpu")
    with pytest.raises(RuntimeError, match="something else"):
        fly(lambda batch: (_ for _ in ()).throw(RuntimeError("something else")), rows, 2, "cpu")


def test_nothing_happened_restores_weights_state_groups_and_randomness() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    weight = model.weight
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    (weight * 2).sum().backward()
    optimizer.step()
    wanted = (
        weight.detach().clone(),
        optimizer.state[weight]["step"].clone(),
        optimizer.state[weight]["exp_avg"].clone(),
    )
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    with nothing_happened(model, optimizer):
        (weight * torch.rand(3)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["k"] = 1
        optimizer.added = "by a step"
    assert torch.equal(weight, wanted[0]) and weight.grad is None
    assert optimizer.param_groups[0]["params"][0] is weight and "k" not in optimizer.param_groups[0]
    assert not hasattr(optimizer, "added")
    assert torch.equal(optimizer.state[weight]["step"], wanted[1]) and torch.equal(
        optimizer.state[weight]["exp_avg"], wanted[2]
    )
    assert torch.equal(torch.rand(1), drawn)


def test_longest_rows_come_longest_first(make_trainer: Any) -> None:
    table = make_trainer().train_dataset
    lengths = [len(row["input_ids"]) for row in longest_rows(table, 3)]
    assert lengths == sorted(table["length"], reverse=True)[:3]
    assert [len(row["input_ids"]) for row in longest_rows(table.remove_columns("length"), 3)] == lengths


def test_metrics_beyond_the_checkpoint_and_half_lines_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    forget_after(tmp_path / "missing.jsonl", 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"optim": "adam_of_tomorrow"}, "adam_of_tomorrow"),
        ({"rank": 0}, "rank is 0, expected 1 or more"),
        ({"overlong": "hope"}, "refuse, truncate, truncate_start, drop"),
        ({"max_length": 1}, "max_length is 1, expected 2 or more"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, expected at least 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=words):
        AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_a_model_without_a_head_and_layers_without_a_name_are_refused(
    make_trainer: Any, tiny_base: Path, byte_tokenizer: Any
) -> None:
    with pytest.raises(ConfigurationError, match="no output head"):
        make_trainer(model=LlamaModel.from_pretrained(tiny_base), keywords={"processing_class": byte_tokenizer})
    with pytest.raises(ConfigurationError, match="does not fit LlamaForCausalLM"):
        make_trainer(target_modules=["no_such_proj"])
