"""What is left of the engine's speed beside processes that keep processors busy? Tokens per second of 16 requests.

    python -m scripts.bench.engine.busy [--base smollm2-135m] [--rounds 3]

Beside none, one and two processes that only count; beside them, transformers' `generate` over the same 16 prompts says what the
machine itself leaves. Each figure is the median of the rounds. Writes results/serving_busy.json.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from scripts.bench.report import write_result

REQUESTS, TOKENS, OTHERS = 16, 48, (0, 1, 2)
PROMPTS = [f"Question {number}: what is the capital of France, and why?" for number in range(REQUESTS)]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that count, each in a session of its own, as another user's would be."""
    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def speed(answer: Callable[[], None], rounds: int) -> float:
    """Tokens per second, in the median of `rounds`."""
    answer()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        answer()
        found.append(REQUESTS * TOKENS / (time.perf_counter() - began))
    return statistics.median(found)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    folder = resolve_base(given.base).folder
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with InferenceEngine.from_base(folder, device="cpu", max_rows=REQUESTS) as engine:
        ids = torch.tensor([engine.tokenizer(prompt)["input_ids"][:12] for prompt in PROMPTS])

        def ours() -> None:
            asked = [
                GenerationRequest(prompt_token_ids=row, max_new_tokens=TOKENS, ignore_eos=True) for row in ids.tolist()
            ]
            for answer in [engine.submit(request) for request in asked]:
                answer.result()

        def transformers() -> None:
            plain.generate(ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

        found: dict[str, dict[str, float]] = {"ours": {}, "transformers": {}}
        for count in OTHERS:
            with busy(count):
                found["ours"][str(count)] = speed(ours, given.rounds)
                found["transformers"][str(count)] = speed(transformers, given.rounds)
    kept = {name: {count: value / of["0"] for count, value in of.items()} for name, of in found.items()}
    payload = {"requests": REQUESTS, "new_tokens": TOKENS, "tokens_per_second": found, "kept": kept}
    print(payload)
    write_result("serving_busy", payload)


if __name__ == "__main__":
    main()
