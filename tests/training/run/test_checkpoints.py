"""Checkpoints: whole, adapter-only, verified when written and when read; a resumed run is the run itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.errors import IntegrityError
from adapterhub_lite.training.run import checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_checkpoint_holds_the_adapter_and_what_others_look_for(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(**SAVING).train()
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-6", "loss.png", "metrics.jsonl"]
    names = {path.name for path in (run / "checkpoint-6").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "hashes.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_args.bin",
        "training_record.json",
    }
    assert all("lora_" in name for name in load_file(run / "checkpoint-6" / "adapter_model.safetensors"))


def test_a_resumed_run_has_the_losses_of_the_run_that_was_not_stopped(make_trainer: Any, tmp_path: Path) -> None:
    # Dropout, so that random numbers count too.
    settings = {**SAVING, "save_total_limit": None, "lora_dropout": 0.1}
    whole = make_trainer("whole", **settings)
    whole.train()
    for step in (2, 4):
        stopped = tmp_path / f"stopped-{step}"
        shutil.copytree(tmp_path / "whole", stopped)
        for late in range(step + 2, 8, 2):
            shutil.rmtree(stopped / f"checkpoint-{late}")
        again = make_trainer(stopped.name, **settings)
        again.train(resume_from_checkpoint=True)
        assert losses(stopped) == losses(tmp_path / "whole")
        for name, parameter in again.model.named_parameters():
            assert torch.equal(parameter, dict(whole.model.named_parameters())[name])


def test_the_best_checkpoint_is_remembered_by_its_final_place(make_trainer: Any, tmp_path: Path, rows: Any) -> None:
    trainer = make_trainer(
        **SAVING,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        keywords={"eval_dataset": rows[:5]},
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run" and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_bytes())
    assert state["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize("damage", ["tensor", "file", "missing"])
def test_a_damaged_checkpoint_is_not_resumed_from(make_trainer: Any, tmp_path: Path, damage: str) -> None:
    make_trainer(**SAVING).train()
    folder = tmp_path / "run" / "checkpoint-6"
    if damage == "tensor":
        tensors = load_file(folder / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, folder / "adapter_model.safetensors")
    elif damage == "file":
        with (folder / "optimizer.pt").open("r+b") as file:
            file.seek(900)
            file.write(b"\0\1\2\3")
    else:
        (folder / "scheduler.pt").unlink()
    with pytest.raises(IntegrityError, match="differs from what was saved in 1 of"):
        make_trainer(**{**SAVING, "max_steps": 8}).train(resume_from_checkpoint=True)


def test_what_was_written_as_something_else_is_noticed_at_once(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    checkpoints.seal(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)})
    assert checkpoints.verify(tmp_path) is not None
    with pytest.raises(IntegrityError, match=r"read back, differs from what was saved in 1 of 2 parts \(b\)"):
        checkpoints.seal(tmp_path, {"a": torch.ones(3), "b": torch.ones(3) * 2})
    with pytest.raises(IntegrityError, match=r"in 1 of 3 parts \(c\)"):
        checkpoints.seal(tmp_path, {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3)})


def test_what_loads_as_something_else_is_noticed(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3)}
    with pytest.raises(IntegrityError, match="as loaded from"):
        checkpoints.check_loaded(checkpoints.tensor_hashes(tensors), {"a": torch.zeros(3)}, tmp_path)
    assert checkpoints.tensor_hashes({"a": torch.ones(3)}) != checkpoints.tensor_hashes({"a": torch.ones(3).half()})


def test_what_a_kill_left_half_written_is_swept_away(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(**SAVING).train()
    half = tmp_path / "run" / checkpoints.STAGING / "checkpoint-8"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    again = make_trainer(**{**SAVING, "max_steps": 7})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7 and not half.parent.exists()
