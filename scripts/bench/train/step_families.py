"""What does a LoRA step cost for bases of several families, beside HF Trainer with PEFT and beside its products alone?

Ten layers of the widths of SmolLM2-135M with random weights, as Llama, Qwen3, Gemma 3 and Phi-3 lay them out;
16 rows of 64 tokens, of which the last 24 are learned, rank 8 on all linear layers. HF runs with and without `bf16=True`, and
its faster setting is what ours is compared with. `floor` is the products of such a step and nothing else.

What is compared are processor seconds of one thread: they are hardly longer where others are at work on the machine. The
seconds on the clock stand beside them.

    python -m scripts.bench.train.step_families                    # all, about two minutes each
    python -m scripts.bench.train.step_families gemma3 --steps 3   # one of them

Each run is a process of its own, so that its peak is its own; parts are merged into results/step_families.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from scripts.bench.report import RESULTS, write_result

NAME = "step_families"
ROWS, TOKENS, LEARNED, RANK = 16, 64, 24, 8
COMMON = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 64, "sliding_window": 512, "query_pre_attn_scalar": 64},
    "phi3": {"model_type": "phi3"},
}
WAYS = ("ours", "hf", "hf_bf16", "floor")


def build(shape: str) -> Any:
    """A base of random weights in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**COMMON, **SHAPES[shape]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def table(count: int) -> Any:
    """Rows of one length, of which the end is learned."""
    from datasets import Dataset

    ids = torch.randint(3, 49000, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-LEARNED] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "length": [TOKENS] * count})


def train(shape: str, way: str, steps: int, folder: str) -> dict[str, Any]:
    """Seconds and processor seconds of each step but the first, and the peak of the process."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    from adapterhub_lite.bases import load_tokenizer, resolve_base
    from adapterhub_lite.training import AdapterTrainer, AdapterTrainingArguments
    from adapterhub_lite.training.run.measurement import PeakMemory
    from scripts.bench.train.step_trainers import Clock, ProcessorClock
    from scripts.bench.train.train_step import BASE

    tokenizer, rows = load_tokenizer(resolve_base(BASE).folder), table(ROWS * steps)
    settings: dict[str, Any] = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": ROWS}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 0}
    clock, processor = Clock(), ProcessorClock()
    memory, predicted = PeakMemory(torch.device("cpu")), None
    trainer: Any
    if way == "ours":
        # The proof wants an end of each answer, which random rows do not have; it is of the first steps and not timed.
        args = AdapterTrainingArguments(**settings, rank=RANK, proof=False, preflight=False, show_progress=False)
        trainer = AdapterTrainer(build(shape), args, rows, processing_class=tokenizer)
        estimate = trainer.memory_choice.uncorrected
        predicted = estimate.total if estimate is not None else None
    else:
        set_seed(0)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = Trainer(
            get_peft_model(build(shape), lora),
            TrainingArguments(**settings, bf16=way == "hf_bf16", logging_steps=1, dataloader_pin_memory=False),
            train_dataset=rows.select_columns(["input_ids", "labels"]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
    trainer.add_callback(clock)
    trainer.add_callback(processor)
    trainer.train()
    found: dict[str, Any] = {
        "seconds": clock.seconds[1:], "processor_seconds": processor.seconds[1:], "peak_bytes": memory.peak_bytes()
    }  # fmt: skip
    return found if predicted is None else {**found, "predicted_bytes": predicted}


def floor(shape: str, steps: int) -> dict[str, Any]:
    """Processor seconds of a step's products alone, each with operands of its own, none of which is copied or kept."""
    model = build(shape)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    attention = model.base_model.layers[0].self_attn
    # What the embeddings go into needs no gradient of them.
    first = {
        module for name, module in attention.named_children() if name in ("q_proj", "k_proj", "v_proj", "qkv_proj")
    }
    inputs = {m.in_features: torch.randn(ROWS * TOKENS, m.in_features).bfloat16() for m in layers}
    outputs = {m.out_features: torch.randn(ROWS * TOKENS, m.out_features).bfloat16() for m in layers}
    a = {width: torch.randn(RANK, width).bfloat16() for width in inputs}
    b = {width: torch.randn(width, RANK).bfloat16() for width in outputs}
    states = torch.randn(ROWS * LEARNED, head.in_features).bfloat16()
    heads, width = COMMON["num_attention_heads"], 64
    q, scores = torch.randn(ROWS * heads, TOKENS, width), torch.randn(ROWS * heads, TOKENS, TOKENS)
    seconds = []
    for _ in range(steps + 1):
        began = time.process_time()
        with torch.no_grad():
            for layer in layers:
                x, grad, down, up = (
                    inputs[layer.in_features],
                    outputs[layer.out_features],
                    a[layer.in_features],
                    b[layer.out_features],
                )
                _, reduced, back = x @ layer.weight.t(), x @ down.t(), grad @ up
                _ = reduced @ up.t(), back.t() @ x, grad.t() @ reduced
                if layer not in first:
                    _ = grad @ layer.weight, back @ down
            for _ in model.base_model.layers:
                # Forward: scores and values; backward: the gradients of both products' four operands.
                _ = (
                    q @ q.transpose(1, 2),
                    scores @ q,
                    scores.transpose(1, 2) @ q,
                    q @ q.transpose(1, 2),
                    scores @ q,
                    scores @ q,
                )
            for part in states.split(64):
                _ = (part @ head.weight.t()) @ head.weight
        seconds.append(time.process_time() - began)
    return {"processor_seconds": seconds[1:]}


def measure(shape: str, way: str, steps: int) -> dict[str, Any]:
    """Run one job in a fresh process."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "scripts.bench.train.step_families",
        "--job",
        shape,
        way,
        str(steps),
    ]
    # With more threads, those that wait for each other would count as well.
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one)
    if done.returncode:
        raise SystemExit(f"{shape} {way} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["median_processor_seconds"] = statistics.median(found["processor_seconds"])
    print(shape, way, found, flush=True)
    return found


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours beside HF's faster setting, beside the floor, and beside its own prediction."""
    ours = runs["ours"]
    best = min(("hf", "hf_bf16"), key=lambda way: runs[way]["median_processor_seconds"])
    return {
        "faster_hf_setting": best,
        "times_faster_than_hf": runs[best]["median_processor_seconds"] / ours["median_processor_seconds"],
        "share_of_hf_peak": ours["peak_bytes"] / runs[best]["peak_bytes"],
        "times_the_floor": ours["median_processor_seconds"] / runs["floor"]["median_processor_seconds"],
        "predicted_over_measured": ours["predicted_bytes"] / ours["peak_bytes"],
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all when not given")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--job", nargs=3, metavar=("SHAPE", "WAY", "STEPS"))
    given = parser.parse_args()
    if given.job:
        shape, way, steps = given.job
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps(
                    floor(shape, int(steps)) if way == "floor" else train(shape, way, int(steps), f"{folder}/run")
                )
            )
        return
    path = RESULTS / f"{NAME}.json"
    for shape in given.shapes or SHAPES:
        runs = {way: measure(shape, way, given.steps) for way in WAYS}
        parts = json.loads(path.read_bytes())["shapes"] if path.exists() else {}
        when = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "load_average": os.getloadavg()[0]}
        parts[shape] = {**summary(runs), **when, "runs": runs}
        if llama := parts.get("llama"):
            for part in parts.values():
                own, its = (one["runs"]["ours"]["median_processor_seconds"] for one in (part, llama))
                part["times_the_llama_step"] = own / its
        write_result(NAME, {"rows": ROWS, "tokens": TOKENS, "learned": LEARNED, "rank": RANK, "shapes": parts})


if __name__ == "__main__":
    main()
