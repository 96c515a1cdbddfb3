"""What do gradient accumulation, checkpointing and fused attention save and cost, each alone, on this machine?

    python -m scripts.bench.train.techniques              # about 4 minutes on 2 quiet cores
    python -m scripts.bench.train.techniques attention    # one of them; the others stay as they were measured

A LoRA of rank 8 on all linear layers of SmolLM2-135M in bf16, rows filled to one length, every variant of a technique on
the same tokens. Each variant runs in a process of its own, so that its peak (of resident memory; on a GPU of the
allocator) is its own. Seconds are the median over updates, the first left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from scripts.bench.report import RESULTS, write_result

NAME = "techniques"
BASE = "smollm2-135m"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "accumulation": {
        f"{rows} x {8 // rows}": {"rows": rows, "accumulation": 8 // rows, "tokens": 256} for rows in (8, 4, 2, 1)
    },
    "checkpointing": {
        "off": {"rows": 4, "tokens": 512, "checkpointing": False},
        "on": {"rows": 4, "tokens": 512, "checkpointing": True},
    },
    "attention": {
        f"{kind}, {tokens} tokens": {"rows": 1, "tokens": tokens, "attention": kind}
        for tokens in (1024, 2048)
        for kind in ("eager", "sdpa")
    },
}


def run_one(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train one variant here and now; returns its peak in bytes, the seconds of its updates, and the first loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from adapterhub_lite.bases import load_tokenizer, resolve_base
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
    from adapterhub_lite.training.run.measurement import PeakMemory
    from scripts.bench.train.step_trainers import Clock

    base, length, count = resolve_base(BASE), job["tokens"], 8 * (job["updates"] + 1)
    tokenizer = load_tokenizer(base.folder)
    words = tokenizer(" ".join(f"word{index % 97}" for index in range(length)))["input_ids"]
    answer = tokenizer.decode(words[: length - 40])  # room for the question and the chat template
    row = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]}
    args = AdapterTrainingArguments(
        output_dir=folder, max_steps=job["updates"], per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=job.get("accumulation", 1), max_length=length,
        activation_checkpointing=job.get("checkpointing", False), padding_free=False, rank=8, logging_steps=1,
        report_to="none", save_strategy="no", show_progress=False, preflight=False, dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.bfloat16, attn_implementation=job.get("attention", "sdpa")
    )
    clock, memory = Clock(), PeakMemory(model.device)
    trainer = AdapterTrainer(model, args, [row] * count, None, tokenizer, base=base)
    trainer.add_callback(clock)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"peak_bytes": memory.peak_bytes(), "seconds": clock.seconds[1:], "first_loss": losses[0]}


def measure(technique: str, updates: int) -> dict[str, Any]:
    """Run every variant of a technique in a fresh process; peaks and seconds, and their ratios to the first variant."""
    table: dict[str, Any] = {}
    for name, variant in VARIANTS[technique].items():
        command = [sys.executable, "-W", "ignore", "-m", "scripts.bench.train.techniques", "--job"]
        done = subprocess.run(
            [*command, json.dumps({**variant, "updates": updates})], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{technique}, {name} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        table[name] = {**variant, **found, "seconds": statistics.median(found["seconds"])}
        first = next(iter(table.values()))
        table[name] |= {f"{key}_to_first": table[name][key] / first[key] for key in ("peak_bytes", "seconds")}
        print(technique, name, {key: round(value, 3) for key, value in found.items() if key != "seconds"}, flush=True)
    return table


def main() -> None:
    """Measure what was asked for and write it into results/techniques.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("techniques", nargs="*", help=f"some of {', '.join(VARIANTS)}; all when not given")
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps of a variant")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.techniques) - set(VARIANTS):
        parser.error(f"there is no technique {', '.join(sorted(unknown))}")
    if given.job:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_one(json.loads(given.job), folder)))
        return
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_bytes())["results"] if path.exists() else {}
    for technique in given.techniques or VARIANTS:
        kept[technique] = measure(technique, given.updates)
    print(write_result(NAME, {"base": BASE, "rank": 8, "results": kept}))


if __name__ == "__main__":
    main()
