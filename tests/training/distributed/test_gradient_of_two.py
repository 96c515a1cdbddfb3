"""Two processes (gloo) make the gradient of one: not only as long a step, which Adam would hide, but the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkout import ROOT

PROGRAM = """
import json, sys
from safetensors.torch import save_file
from transformers import TrainerCallback
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        if args.should_save:
            save_file(found, f"{folder}-step-{state.global_step + 1}.safetensors")

base, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
# Lengths and shares of learned tokens differ from row to row, so that no mean of means comes out right by chance.
rows = [{"messages": [{"role": "user", "content": "y" * (i * 5 % 11 + 1)}, {"role": "assistant", "content": "x" * (i * 7 % 13 + 1)}]}
        for i in range(16)]
args = AdapterTrainingArguments(output_dir=folder, show_progress=False, use_cpu=True, rank=4, max_steps=2, save_strategy="no",
                                **{"base_dtype": "float32", "max_grad_norm": 0.0, **settings})
trainer = AdapterTrainer(base, args, rows, callbacks=[Gradients()])
trainer.train()
if args.should_save:
    if trainer.masters and trainer.masters.pairs:
        names = {weight: name for name, weight in trainer.model.named_parameters()}
        save_file({names[weight]: copy.detach() for weight, copy in trainer.masters.pairs}, f"{folder}-masters.safetensors")
    print(json.dumps({"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}))
"""


def run(processes: int, base: Path, folder: Path, **settings: Any) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """The losses of two steps and their gradients, before anything clips or steps."""
    program = folder.with_suffix(".py")
    program.write_text(PROGRAM)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(start if processes > 1 else []), str(program), str(base), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, json.dumps(settings)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    said = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return said["losses"], [load_file(f"{folder}-step-{step}.safetensors") for step in (1, 2)]


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_one(tiny_base: Path, tmp_path: Path) -> None:
    losses, gradients = run(1, tiny_base, tmp_path / "one", per_device_train_batch_size=8)
    assert max(float(g.abs().max()) for g in gradients[1].values()) > 1e-3
    cuts = {"4 rows each": (4, 1), "2 rows each, twice": (2, 2)}
    for name, (rows, times) in cuts.items():
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        found, theirs = run(2, tiny_base, tmp_path / f"two-{times}", **settings)
        assert found == pytest.approx(losses, rel=1e-5), name
        torch.testing.assert_close(theirs, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["full", "head-only"])
def test_whole_weights_with_fp32_copies_move_as_in_one_process(preset: str, tiny_base: Path, tmp_path: Path) -> None:
    settings = {"memory_preset": preset, "base_dtype": None, "optim": "sgd", "learning_rate": 1e-2, "warmup_steps": 0}
    losses, gradients = run(1, tiny_base, tmp_path / "one", per_device_train_batch_size=8, **settings)
    begun = load_file(tiny_base / "model.safetensors")
    masters = load_file(tmp_path / "one-masters.safetensors")
    assert len(masters) == (len(begun) if preset == "full" else 1)
    for name, (rows, times) in {"4 rows each": (4, 1), "2 rows each, twice": (2, 2)}.items():
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        found, theirs = run(2, tiny_base, tmp_path / f"two-{times}", **batches, **settings)
        assert found == pytest.approx(losses, rel=1e-2), name
        for ours, wanted in zip(theirs, gradients, strict=True):
            assert ours.keys() == wanted.keys()
            for part, gradient in wanted.items():
                # Each process rounds its own part to bf16.
                assert (ours[part] - gradient).float().norm() <= 2e-2 * gradient.float().norm(), (name, part)
        for part, copy in load_file(tmp_path / f"two-{times}-masters.safetensors").items():
            moved = (masters[part] - begun[part].float()).norm()
            assert moved > 0 and (copy - masters[part]).norm() <= 2e-2 * moved, (name, part)
