"""What the engine's own int8 and int4 weights cost in quality and give in time and memory, beside the base as it was saved.

    python -m scripts.bench.engine.precision [--base smollm2-135m] [--rounds 12] [--home FOLDER]

Perplexity is on the descriptions of installed Python packages, in pieces of 512 tokens. Steps are timed in turns in one
process; memory is what a process of its own holds after 16 rows. With --home, each adapter of the example tasks there
answers held-out questions in each precision. Writes results/serving_precision.json.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.bases import ResolvedBase, load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model.compiled.packed_weights import QUANTISED, Precision
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from adapterhub_lite.tasks import TASKS
from scripts.bench.report import write_result

PIECE, PIECES, ROWS, CONTEXT = 512, 32, 16, 64
ASKED: tuple[Precision | None, ...] = (None, *QUANTISED)
MEMORY = """
import sys, torch
from adapterhub_lite.devices import trim_heap
from scripts.bench.engine.precision import *
runner = open_runner(resolve_base(sys.argv[1]), None if sys.argv[2] == "saved" else sys.argv[2])
trim_heap()  # as an engine does when it has loaded
with torch.inference_mode():
    decoding(runner, 16)()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")))
"""


def open_runner(base: ResolvedBase, precision: Precision | None) -> ModelRunner:
    """The lean pass over a base, its linear layers kept as `precision`."""
    return ModelRunner(load_base_model(base.folder), rows=ROWS, kind=ForwardKind.LEAN, precision=precision)


def text_tokens(base: ResolvedBase) -> list[int]:
    """Tokens of what packages say of themselves."""
    bodies = [str(one.read_text("METADATA") or "").partition("\n\n")[2][500:3500] for one in distributions()]
    text = "\n\n".join(sorted({body for body in bodies if len(body) > 2500}))
    found: list[int] = load_tokenizer(base.folder)(text)["input_ids"]
    return found[: PIECE * PIECES]


@torch.inference_mode()
def read(runner: ModelRunner, tokens: list[int]) -> tuple[float, torch.Tensor]:
    """The perplexity over pieces of a text, and the likeliest token at each place."""
    total, count, best = 0.0, 0, []
    for at in range(0, len(tokens) - PIECE + 1, PIECE):
        piece = tokens[at : at + PIECE]
        runner.admit(0, (), PIECE + 1)
        logprobs = torch.log_softmax(runner.forward(pack([RowSlice(0, 0, piece, PIECE)])), -1)
        runner.leave(0)
        total -= float(logprobs[:-1].gather(1, torch.tensor(piece[1:])[:, None]).sum())
        count += PIECE - 1
        best.append(logprobs.argmax(-1))
    return math.exp(total / count), torch.cat(best)


def decoding(runner: ModelRunner, rows: int) -> Callable[[], object]:
    """A step in which `rows` rows write a token each, after prompts of `CONTEXT` tokens."""
    for row in range(rows):
        runner.admit(row, (), 2 * CONTEXT)
        runner.forward(pack([RowSlice(row, 0, list(range(100, 100 + CONTEXT)))]))
    step = pack([RowSlice(row, CONTEXT, [5]) for row in range(rows)])
    return lambda: runner.forward(step)


def exact_matches(base: ResolvedBase, registry: AdapterRegistry, questions: int) -> dict[str, dict[str, float]]:
    """For each task that is registered and each precision, the share of held-out answers that are right."""
    found: dict[str, dict[str, float]] = {}
    for precision in ASKED:
        with InferenceEngine.from_base(base.folder, registry=registry, device="cpu", quantization=precision) as engine:
            for task in TASKS:
                rows = TASKS[task].rows(questions, split="held-out")
                requests = [
                    GenerationRequest(messages=row["messages"][:1], adapter=task, max_new_tokens=96) for row in rows
                ]
                answers = engine.generate_many(requests)
                right = [a.text.strip() == row["messages"][1]["content"] for a, row in zip(answers, rows, strict=True)]
                found.setdefault(task, {})[precision or "saved"] = sum(right) / len(right)
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--home")
    options = parser.parse_args()
    base = resolve_base(options.base)
    registry = AdapterRegistry(Path(options.home)) if options.home else None
    if registry:
        for task in TASKS:
            registry.resolve(task)  # before the work starts
    tokens = text_tokens(base)
    runners = {precision or "saved": open_runner(base, precision) for precision in ASKED}
    quality: dict[str, Any] = {}
    plain: tuple[float, torch.Tensor] | None = None
    for name, runner in runners.items():
        perplexity, best = read(runner, tokens)
        plain = plain or (perplexity, best)
        quality[name] = {
            "perplexity": perplexity, "over_saved": perplexity / plain[0],
            "same_likeliest_token": float((best == plain[1]).float().mean()),
        }  # fmt: skip
    steps: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in (1, ROWS):
            ways = {name: decoding(runner, rows) for name, runner in runners.items()}
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for round_ in range(options.rounds + 1):
                for name, way in ways.items():
                    started = time.perf_counter()
                    way()
                    if round_:
                        taken[name].append(time.perf_counter() - started)
            steps[f"{rows}_rows"] = {name: statistics.median(values) for name, values in taken.items()}
    memory = {}
    for name in runners:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, options.base, name], capture_output=True, text=True, check=True
        )
        memory[name] = int(done.stdout.split()[-1])
    payload: dict[str, Any] = {
        "tokens": len(tokens), "quality": quality, "step_seconds": steps, "resident_bytes_after_16_rows": memory,
    }  # fmt: skip
    if registry:
        payload["exact_match"] = exact_matches(base, registry, options.questions)
    print(json.dumps(payload, indent=1))
    write_result("serving_precision", payload)


if __name__ == "__main__":
    main()
