"""Two processes on one machine (DDP over gloo): the same adapter as one process, saved once, resumable."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = """
import json, sys
from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
base, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
resume = settings.pop("resume", None)
rows = [{"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
        for i in range(32)]
args = AdapterTrainingArguments(output_dir=folder, show_progress=False, use_cpu=True, rank=4, learning_rate=5e-3,
                                lr_scheduler_type="constant", warmup_steps=0, base_dtype="float32", **settings)
trainer = AdapterTrainer(base, args, rows, eval_dataset=rows[:5])
trainer.train(resume_from_checkpoint=resume)
found = trainer.evaluate()
if args.should_save:
    trainer.save_adapter(folder + "/adapter")
    print(json.dumps({"eval": found, "steps": trainer.state.global_step}))
"""


def run(processes: int, base: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    # --standalone finds a free port by itself.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(launch if processes > 1 else [])]
    done = subprocess.run(
        [*command, str(program), str(base), str(folder), json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    return {**found, "adapter": load_file(folder / "adapter" / "adapter_model.safetensors")}


@pytest.mark.soak
def test_two_processes_end_with_the_adapter_of_one(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    one = run(1, tiny_base, tmp_path / "one", per_device_train_batch_size=8, **settings)
    two = run(2, tiny_base, tmp_path / "two", per_device_train_batch_size=4, **settings)
    accumulated = run(
        2, tiny_base, tmp_path / "four", per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings
    )
    for other in (two, accumulated):
        torch.testing.assert_close(other["adapter"], one["adapter"], rtol=1e-3, atol=1e-5)
    for name in ("eval_loss", "eval_token_accuracy", "eval_tokens"):
        assert two["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4), name
    names = {path.name for path in (tmp_path / "two" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "hashes.json", "adapter_model.safetensors"} <= names
    assert not any("model-" in name for name in names)
    for count in (1, 2):
        resumed = run(
            count,
            tiny_base,
            tmp_path / f"resumed-{count}",
            per_device_train_batch_size=8 // count,
            resume=str(tmp_path / "two" / "checkpoint-2"),
            **settings,
        )
        torch.testing.assert_close(resumed["adapter"], one["adapter"], rtol=1e-3, atol=1e-5)
