"""Several processes on one machine (gloo): each engine ends with the adapter of one process, saved once, resumable.

All runs share three launches: one process, two processes, and one process again that resumes what two have begun.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.presets import deepspeed_config
from adapterhub_lite.training import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import join_processes
from tests.checkout import ROOT

# The first test waits for all three launches.
pytestmark = pytest.mark.timeout(1800)
PROGRAM = Path(__file__).with_name("several_processes.py")
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install adapterhub-lite[deepspeed]"
)
FP32 = {"base_dtype": "float32"}
# How each engine is asked for: by preset, but ZeRO-1 as DeepSpeed's users do, by a configuration of their own.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"memory_preset": "ddp", **FP32},
    "zero1": {"deepspeed": deepspeed_config(1), **FP32},
    "zero2": {"memory_preset": "zero2", **FP32},
    "zero3": {"memory_preset": "zero3", **FP32},
    "fsdp": {"memory_preset": "fsdp", **FP32},
    "fsdp-qlora": {"memory_preset": "fsdp-qlora"},
}
ON_THE_HEAD = {"target_modules": ["q_proj", "lm_head"]}
EXACT = [
    pytest.param(name, marks=needs_deepspeed if name.startswith("zero") else ())
    for name in ENGINES
    if name != "fsdp-qlora"
]
ZERO = ("zero1", "zero2", "zero3") if find_spec("deepspeed") else ()
Found = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """What the launches left: a folder a run, and what each process of it found."""

    folder: Path
    found: dict[str, list[Found]]

    def __getitem__(self, name: str) -> Found:
        return self.found[name][0]

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")


def launch(processes: int, base: Path, folder: Path, jobs: dict[str, Found]) -> dict[str, list[Found]]:
    """Run `jobs` (folder name -> settings) one after another in one launch; what each process found, by job."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    # --standalone finds a free port by itself.
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    wanted = json.dumps({str(folder / name): settings for name, settings in jobs.items()})
    results = folder / f"{processes}-{next(iter(jobs))}-"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *(start if processes > 1 else []), PROGRAM, base, wanted, results],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads(Path(f"{results}{rank}").read_text()) for rank in range(processes)]
    return {name: [of_rank[name] for of_rank in found] for name in jobs}


@pytest.fixture(scope="module")
def untied_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a head of its own: a LoRA on a tied head is refused before it is trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One run in one process, and under each engine: in two, accumulated, resumed, broken, begun by one or by two."""
    folder = tmp_path_factory.mktemp("runs")
    one = {"one": alone("ddp"), "head": alone("ddp", **ON_THE_HEAD)}
    if ZERO:
        one["one-zero3"] = alone("zero3")
    found = launch(1, untied_base, folder, one)
    two = {"ddp-of-one": job(4, "ddp", resume=middle(folder, "one"))}
    for name in (*(name for name in ENGINES if name not in ZERO_NAMES), *ZERO):
        # In bf16, another shape of batch would be another rounding.
        two[name] = job(4, name) if name == "fsdp-qlora" else job(2, name, gradient_accumulation_steps=2)
        two[f"{name}-resumed"] = job(4, name, resume=middle(folder, name))
        two[f"{name}-broken"] = job(4, name, broken=True)
    if ZERO:
        two["zero3-of-one"] = job(4, "zero3", resume=middle(folder, "one-zero3"))
        two["head-zero3"] = job(4, "zero3", **ON_THE_HEAD)
    found |= launch(2, untied_base, folder, two)
    again = {f"{name}-by-one": alone(name, resume=middle(folder, name)) for name in ("ddp", *ZERO)}
    # No engine at all: what FSDP and ZeRO-3 have split is resumed whole.
    again |= {f"{name}-plain": alone("ddp", resume=middle(folder, name)) for name in ("fsdp", *ZERO[2:])}
    found |= launch(1, untied_base, folder, again)
    return Runs(folder, found)


ZERO_NAMES = ("zero1", "zero2", "zero3")


def job(rows: int, engine: str, **more: Any) -> Found:
    return {"per_device_train_batch_size": rows, **ENGINES[engine], **more}


def alone(engine: str, **more: Any) -> Found:
    """A job for one process: under ZeRO it has to be asked for by a configuration, elsewhere there is no engine."""
    zero = engine.startswith("zero")
    how = {"deepspeed": deepspeed_config(int(engine[-1])), **FP32} if zero else {"memory_preset": "lora-fp32"}
    return {"per_device_train_batch_size": 8, **how, **more}


def middle(folder: Path, name: str) -> str:
    return str(folder / name / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", EXACT)
def test_each_engine_makes_the_adapter_of_one_process(engine: str, runs: Runs) -> None:
    one = runs["one"]
    assert min(norm for _, norm in one["steps"]) > 0.5, "every step is clipped"
    names = [name for name in runs.found if name.startswith(engine) and "steps" in runs[name] and "qlora" not in name]
    assert len(names) >= 3
    for name in names:
        torch.testing.assert_close(
            runs.adapter(name), runs.adapter("one"), msg=lambda text, name=name: f"{name}: {text}"
        )
        # A resumed run makes the last steps only.
        steps = runs[name]["steps"]
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(one["steps"][-len(steps) :]))
        for metric in ("eval_loss", "eval_token_accuracy", "eval_tokens"):
            assert runs[name]["eval"][metric] == pytest.approx(one["eval"][metric], rel=1e-6), (name, metric)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*EXACT, "fsdp-qlora"])
def test_a_checkpoint_is_written_once_and_holds_nothing_of_the_base(engine: str, runs: Runs) -> None:
    first, second = (found["written"] for found in runs.found[engine])
    assert "hashes.json" in first and "adapter_config.json" in first
    assert "hashes.json" not in second and "adapter_config.json" not in second
    checkpoint = runs.folder / engine / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    state = {"optimizer.pt"} if engine == "ddp" else {"whole_state.safetensors"}
    assert names == state | {
        "adapter_config.json", "adapter_model.safetensors", "hashes.json", "scheduler.pt", "trainer_state.json",
        "rng_state_0.pth", "rng_state_1.pth", "training_record.json",
        # What others look for beside the weights.
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "training_args.bin",
    }  # fmt: skip
    adapter = sum(tensor.numel() for tensor in runs.adapter(engine).values())
    assert sum(tensor.numel() for tensor in load_file(checkpoint / "adapter_model.safetensors").values()) == adapter
    # Weights and two moments at most, and a step a tensor.
    kept = stored(checkpoint / state.pop())
    assert 2 * adapter <= kept <= 3 * adapter + len(runs.adapter(engine))


def stored(path: Path) -> int:
    """How many numbers lie in a file of tensors."""
    if path.suffix == ".safetensors":
        return sum(tensor.numel() for tensor in load_file(path).values())
    states = torch.load(path, weights_only=True)["state"]
    return sum(tensor.numel() for state in states.values() for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", EXACT)
def test_plain_peft_loads_what_was_saved(engine: str, runs: Runs, untied_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from adapterhub_lite.adapter_format.probes import replay_probes

    base = AutoModelForCausalLM.from_pretrained(untied_base)
    model = PeftModel.from_pretrained(base, runs.folder / engine / "adapter")
    assert replay_probes(model, runs.folder / engine / "adapter").passed


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*EXACT, "fsdp-qlora"])
def test_the_first_steps_are_proven(engine: str, runs: Runs) -> None:
    for found in runs.found[f"{engine}-broken"]:
        assert "got only zero gradients in two steps" in found["proof"]


@pytest.mark.slow
def test_weights_are_split_where_the_engine_says_so(runs: Runs) -> None:
    split = {name for name in ENGINES if name in runs.found and runs[name]["split"] > 0}
    assert split == {"fsdp", "fsdp-qlora", *ZERO[2:]}


@pytest.mark.slow
def test_four_bits_split_by_fsdp_learn_and_resume(runs: Runs) -> None:
    torch.testing.assert_close(runs.adapter("fsdp-qlora-resumed"), runs.adapter("fsdp-qlora"), rtol=1e-2, atol=1e-3)
    losses = [loss for loss, _ in runs["fsdp-qlora"]["steps"]]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("how", ["arguments", "accelerate launch"])
def test_fsdp_on_a_cpu_is_refused_rather_than_left_out(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "accelerate launch":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = AdapterTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fsdp=None if "launch" in how else True)
    with pytest.raises(ConfigurationError, match="Accelerate does not split a model with FSDP on a CPU"):
        join_processes(args)


def test_one_process_that_sees_several_gpus_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Start one process per GPU"):
        join_processes(SimpleNamespace(n_gpu=2))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP through Accelerate as it is wants two GPUs")
@pytest.mark.parametrize("preset", ["fsdp", "fsdp-qlora"])
def test_fsdp_on_gpus_learns_and_resumes(preset: str, tiny_base: Path, tmp_path: Path) -> None:
    wanted = {"memory_preset": preset, "use_cpu": False, "base_dtype": None}
    jobs = {"two": job(4, preset, **wanted), "resumed": job(4, preset, resume=middle(tmp_path, "two"), **wanted)}
    runs = Runs(tmp_path, launch(2, tiny_base, tmp_path, jobs))
    torch.testing.assert_close(runs.adapter("resumed"), runs.adapter("two"), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@needs_deepspeed
def test_zero3_trains_a_lora_on_the_head(runs: Runs) -> None:
    """Its matrices are in parts outside their modules, so the head itself is asked, and the record says so."""
    assert any("lm_head" in name for name in runs.adapter("head"))
    torch.testing.assert_close(runs.adapter("head-zero3"), runs.adapter("head"))
    record = json.loads((runs.folder / "head-zero3" / "adapter" / "training_record.json").read_text())
    assert "ZeRO-3" in record["loss_backend"]["reason"]
