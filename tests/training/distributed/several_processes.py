"""What each process of `test_distributed.py` runs: the jobs it is given, one after another, as many engines as they name.

Importing torch and DeepSpeed takes longer than the jobs themselves, so that one launch does them all.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

WRITTEN: set[str] = set()
ROWS = [
    {"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
    for i in range(32)
]


def main() -> None:
    """Run the jobs (folder -> settings) in argv[2] on the base in argv[1]; the results go to argv[3] and the rank."""
    sys.addaudithook(note_what_is_written)
    base, jobs = sys.argv[1], json.loads(sys.argv[2])
    found = {Path(folder).name: run(base, folder, settings) for folder, settings in jobs.items()}
    Path(sys.argv[3] + os.environ.get("RANK", "0")).write_text(json.dumps(found))


def note_what_is_written(event: str, details: tuple[Any, ...]) -> None:
    """Keep the name of every file that this process opens to write, or renames."""
    if event == "open" and isinstance(details[1], str) and set(details[1]) & set("wax+"):
        WRITTEN.add(Path(str(details[0])).name)
    elif event == "os.rename":
        WRITTEN.add(Path(str(details[1])).name)


def run(base: str, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run from its first step, or from its checkpoint `resume`, to its adapter; `broken` takes its gradients away."""
    from adapterhub_lite.errors import ProofFailedError
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments

    class Broken(AdapterTrainer):
        def compute_loss(self, *args: Any, **keywords: Any) -> Any:
            return super().compute_loss(*args, **keywords) * 0.0

    forget_engines()
    WRITTEN.clear()
    resume, broken = settings.pop("resume", None), settings.pop("broken", False)
    if settings.get("use_cpu", True) and settings.get("memory_preset", "").startswith("fsdp"):
        lift_the_gate_of_fsdp()
    args = AdapterTrainingArguments(
        output_dir=folder, show_progress=False, rank=4, learning_rate=5e-3, warmup_steps=0,
        lr_scheduler_type="linear", max_grad_norm=0.5, max_steps=4, save_strategy="steps", save_steps=2,
        **{"use_cpu": True, **settings},
    )  # fmt: skip
    trainer = (Broken if broken else AdapterTrainer)(base, args, ROWS, eval_dataset=ROWS[:5])
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ProofFailedError as error:
        return {"proof": str(error)}
    found = trainer.evaluate()
    trainer.save_adapter(folder + "/adapter")
    steps = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    split = sum(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in trainer.model.parameters())
    return {"eval": found, "steps": steps, "split": split, "written": sorted(WRITTEN)}


def forget_engines() -> None:
    """Each engine leaves marks in the process, which the next job would take for an order."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()


def lift_the_gate_of_fsdp() -> None:
    """Let Accelerate split a model with FSDP2 over CPU processes: it can, and leaves it out by a list of devices alone.

    So the whole path of FSDP runs here as on GPUs, and the refusals of this project have to be taken out as well.
    """
    import accelerate.state as state

    from adapterhub_lite.training.model import assembly
    from adapterhub_lite.training.run import memory_choice

    assembly.join_processes = lambda args: None
    memory_choice.refusal = lambda *args, **keywords: None
    if getattr(state.AcceleratorState, "gate_lifted", False):
        return
    begin = state.AcceleratorState.__init__

    def begin_split(self: Any, *args: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, state.DistributedType.FSDP

    state.AcceleratorState.__init__, state.AcceleratorState.gate_lifted = begin_split, True


if __name__ == "__main__":
    main()
