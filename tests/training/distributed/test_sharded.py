"""Tensors that FSDP2 has split on a CPU mesh: the loss and what is saved are those of the whole model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

PROGRAM = """
import sys, torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from adapterhub_lite.losses import causal_lm_loss, head_of
from adapterhub_lite.training.run.step_loss import EvaluationSums
from adapterhub_lite.training.model.assembly import HiddenStates
from adapterhub_lite.training.distributed.sharded import part_at_exit
from adapterhub_lite.training.model.adapters import whole_tensors

dist.init_process_group("gloo")
part_at_exit()
mesh = init_device_mesh("cpu", (2,))

def build():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model

ids = torch.arange(24).view(2, 12) + 5

def step(model, loss_of):
    hidden, _ = HiddenStates(model).of(model, {"input_ids": ids})
    sums = EvaluationSums()
    # None on one process: a different number of valid tokens on each process must not unpair what they exchange.
    goals = ids.flatten().clone()
    goals[: 24 * dist.get_rank()] = -100
    sums.add(head_of(model), hidden.flatten(0, 1).detach(), goals)
    loss = loss_of(head_of(model), hidden, ids)
    loss.backward()
    return loss.detach(), sums.sums

plain, split = build(), build()
layers = split.get_base_model().model.layers
for layer in layers:
    fully_shard(layer, mesh=mesh)
fully_shard(split, mesh=mesh)
assert hasattr(split.get_output_embeddings().weight, "full_tensor")
truth, truth_sums = step(plain, causal_lm_loss)
found, found_sums = step(split, causal_lm_loss)
torch.testing.assert_close(found, truth)
torch.testing.assert_close(found_sums, truth_sums)
whole = whole_tensors(split)
for name, tensor in whole_tensors(plain).items():
    torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0)
gradients = {name: p.grad for name, p in split.named_parameters() if p.requires_grad}
for name, parameter in plain.named_parameters():
    if parameter.requires_grad:
        torch.testing.assert_close(gradients[name].full_tensor(), parameter.grad)
"""


@pytest.mark.slow
def test_fsdp2_changes_neither_the_loss_nor_what_is_saved(tiny_base: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, str(program), str(tiny_base)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
