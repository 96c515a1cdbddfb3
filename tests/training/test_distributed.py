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
base, jobs = sys.argv[1], json.loads(sys.argv[2])
rows = [{"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
        for i in range(32)]
for folder, settings in jobs.items():
    resume = settings.pop("resume", None)
    args = AdapterTrainingArguments(output_dir=folder, show_progress=False, use_cpu=True, rank=4, learning_rate=5e-3,
                                    lr_scheduler_type="constant", warmup_steps=0, base_dtype="float32", **settings)
    trainer = AdapterTrainer(base, args, rows, eval_dataset=rows[:5])
    trainer.train(resume_from_checkpoint=resume)
    found = trainer.evaluate()
    if args.should_save:
        trainer.save_adapter(folder + "/adapter")
        print(json.dumps({"folder": folder, "eval": found, "steps": trainer.state.global_step}))
"""


def run(processes: int, base: Path, folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Train `jobs` (folder name -> settings) one after another in one launch; returns what each found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    program = folder / "program.py"
    program.write_text(PROGRAM)
    # --standalone finds a free port by itself.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(launch if processes > 1 else [])]
    wanted = json.dumps({str(folder / name): settings for name, settings in jobs.items()})
    done = subprocess.run([*command, str(program), str(base), wanted], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [Path(line["folder"]).name for line in lines] == list(jobs)
    return {
        name: {**line, "adapter": load_file(folder / name / "adapter" / "adapter_model.safetensors")}
        for name, line in zip(jobs, lines, strict=True)
    }


@pytest.mark.slow
def test_two_processes_end_with_the_adapter_of_one(tiny_base: Path, tmp_path: Path) -> None:
    def job(rows: int, **more: Any) -> dict[str, Any]:
        return {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": rows, **more}

    middle = str(tmp_path / "two" / "checkpoint-2")
    jobs = {"two": job(4), "accumulated": job(2, gradient_accumulation_steps=2), "resumed": job(4, resume=middle)}
    found = run(2, tiny_base, tmp_path, jobs)
    found |= run(1, tiny_base, tmp_path, {"one": job(8), "resumed by one": job(8, resume=middle)})
    for name in ("two", "accumulated", "resumed", "resumed by one"):
        torch.testing.assert_close(found[name]["adapter"], found["one"]["adapter"], rtol=1e-3, atol=1e-5)
    for name in ("eval_loss", "eval_token_accuracy", "eval_tokens"):
        assert found["two"]["eval"][name] == pytest.approx(found["one"]["eval"][name], rel=1e-4), name
    names = {path.name for path in (tmp_path / "two" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "hashes.json", "adapter_model.safetensors"} <= names
    assert not any("model-" in name for name in names)
