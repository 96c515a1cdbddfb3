"""Several processes on one machine (gloo): each strategy ends with the adapter of one process, saved once, resumable."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
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
    if "stage" in settings:
        from adapterhub_lite.memory.presets import deepspeed_config
        settings["deepspeed"] = deepspeed_config(settings.pop("stage"))
    settings = {"use_cpu": True, "base_dtype": "float32", **settings}
    args = AdapterTrainingArguments(output_dir=folder, show_progress=False, rank=4, learning_rate=5e-3,
                                    lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.5, **settings)
    trainer = AdapterTrainer(base, args, rows, eval_dataset=rows[:5])
    trainer.train(resume_from_checkpoint=resume)
    found = trainer.evaluate()
    trainer.save_adapter(folder + "/adapter")
    if args.should_save:
        print(json.dumps({"folder": folder, "eval": found, "steps": trainer.state.global_step}))
"""
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install adapterhub-lite[deepspeed]"
)


def launch(
    processes: int, base: Path, folder: Path, jobs: dict[str, dict[str, Any]]
) -> subprocess.CompletedProcess[str]:
    """Run `jobs` (folder name -> settings) one after another in one launch."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])
    }  # fmt: skip
    program = folder / "program.py"
    program.write_text(PROGRAM)
    # --standalone finds a free port by itself.
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(start if processes > 1 else [])]
    wanted = json.dumps({str(folder / name): settings for name, settings in jobs.items()})
    return subprocess.run(
        [*command, str(program), str(base), wanted], capture_output=True, text=True, env=environment, timeout=300
    )


def run(processes: int, base: Path, folder: Path, jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`launch` that must end well; returns what each job found, with its adapter."""
    done = launch(processes, base, folder, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [Path(line["folder"]).name for line in lines] == list(jobs)
    return {
        name: {**line, "adapter": load_file(folder / name / "adapter" / "adapter_model.safetensors")}
        for name, line in zip(jobs, lines, strict=True)
    }


def job(rows: int, **more: Any) -> dict[str, Any]:
    return {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": rows, **more}


@pytest.fixture(scope="module")
def one(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that all others must equal: one process, all rows of a step at once."""
    return run(1, tiny_base, tmp_path_factory.mktemp("one"), {"one": job(8)})["one"]


def assert_same(found: dict[str, Any], one: dict[str, Any]) -> None:
    """The adapter to fp32 tolerance, and the evaluation, which gathers sums."""
    torch.testing.assert_close(found["adapter"], one["adapter"], rtol=1e-3, atol=1e-5)
    for name in ("eval_loss", "eval_token_accuracy", "eval_tokens"):
        assert found["eval"][name] == pytest.approx(one["eval"][name], rel=1e-4), name


def assert_only_an_adapter(checkpoint: Path) -> None:
    """Nothing of the base: the tiny base has 272 * 32 embeddings alone, the whole adapter fewer numbers."""
    names = {path.name for path in checkpoint.iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "hashes.json", "adapter_model.safetensors"} <= names
    for path in checkpoint.glob("*.safetensors"):
        assert all("lora_" in name or name == "step" for name in load_file(path)), path.name
    assert not [path for path in checkpoint.rglob("*") if "model_states" in path.name]


@pytest.mark.slow
def test_two_processes_end_with_the_adapter_of_one(tiny_base: Path, tmp_path: Path, one: dict[str, Any]) -> None:
    middle = str(tmp_path / "two" / "checkpoint-2")
    jobs = {"two": job(4), "accumulated": job(2, gradient_accumulation_steps=2), "resumed": job(4, resume=middle)}
    found = run(2, tiny_base, tmp_path, jobs)
    found |= run(1, tiny_base, tmp_path, {"resumed by one": job(8, resume=middle)})
    for each in found.values():
        assert_same(each, one)
    assert_only_an_adapter(tmp_path / "two" / "checkpoint-4")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_ends_with_the_adapter_of_one_process(
    stage: int, tiny_base: Path, tmp_path: Path, one: dict[str, Any]
) -> None:
    found = run(2, tiny_base, tmp_path, {"two": job(2, stage=stage, gradient_accumulation_steps=2)})
    assert_only_an_adapter(tmp_path / "two" / "checkpoint-2")
    middle = str(tmp_path / "two" / "checkpoint-2")
    for processes in (1, 2) if stage == 3 else (1,):
        again = job(8 // processes, stage=stage, resume=middle)
        found |= run(processes, tiny_base, tmp_path, {f"resumed by {processes}": again})
    for each in found.values():
        assert_same(each, one)


@pytest.mark.slow
@needs_deepspeed
def test_plain_peft_loads_what_zero3_saved(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adapterhub_lite.canary import replay_canary

    run(2, tiny_base, tmp_path, {"two": job(4, memory_preset="zero3")})
    folder = tmp_path / "two" / "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
    assert replay_canary(model, folder).passed


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_refused_rather_than_left_out(tiny_base: Path, tmp_path: Path) -> None:
    done = launch(2, tiny_base, tmp_path, {"two": job(4, fsdp="full_shard")})
    assert done.returncode != 0
    assert "Accelerate does not split a model with FSDP on a CPU" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP splits a model over GPUs: two are needed")
@pytest.mark.parametrize("preset", ["fsdp", "fsdp-qlora"])
def test_fsdp_on_gpus_learns_and_resumes(preset: str, tiny_base: Path, tmp_path: Path) -> None:
    wanted = {"memory_preset": preset, "use_cpu": False, "base_dtype": None}
    middle = str(tmp_path / "two" / "checkpoint-2")
    found = run(2, tiny_base, tmp_path, {"two": job(4, **wanted), "resumed": job(4, resume=middle, **wanted)})
    torch.testing.assert_close(found["resumed"]["adapter"], found["two"]["adapter"], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@needs_deepspeed
def test_zero3_trains_a_lora_on_the_head(tiny_base: Path, tmp_path: Path) -> None:
    """Its matrices are in parts outside their modules, so the head itself is asked, and the record says so."""
    head = {"target_modules": ["q_proj", "lm_head"]}
    one = run(1, tiny_base, tmp_path, {"one": job(8, **head)})["one"]
    found = run(2, tiny_base, tmp_path, {"two": job(4, stage=3, **head)})["two"]
    assert any("lm_head" in name for name in one["adapter"])
    assert_same(found, one)
    record = json.loads((tmp_path / "two" / "adapter" / "training_record.json").read_text())
    assert "ZeRO-3" in record["loss_backend"]["reason"]
