"""What guessed tokens give: tokens a second of one request with and without them, on tasks and on free text.

    python -m scripts.bench.engine.guesses --home FOLDER [--base smollm2-135m] [--questions 12] [--rounds 3]

Both engines answer the same questions in turns, in one process; answers must be equal. The adapters `sql` and `event` are
those of the home; extraction asks the base to repeat a sentence of its prompt as a form of fixed words demands; free text
is a story. Writes results/serving_guesses.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.tasks import TASKS
from scripts.bench.report import write_result

TOPICS = ("a lighthouse", "the first snow", "an old clock", "two rivers", "a lost letter", "the night train")
CUSTOMERS = ("Ada Kowalski", "Ben Okafor", "Chiara Rossi", "Dimitri Ivanov", "Elif Demir", "Farah Haddad")


def requests(questions: int) -> dict[str, list[GenerationRequest]]:
    """The requests of each kind."""
    found: dict[str, list[GenerationRequest]] = {}
    for task in TASKS:
        rows = TASKS[task].rows(questions, split="held-out")
        found[task] = [GenerationRequest(messages=row["messages"][:1], adapter=task, max_new_tokens=96) for row in rows]
    schema = {
        "type": "object", "additionalProperties": False, "required": ["customer_name", "order_number", "city"],
        "properties": {name: {"type": "string", "maxLength": 40} for name in ("customer_name", "order_number", "city")},
    }  # fmt: skip
    found["extraction"] = [
        GenerationRequest(
            messages=[{"role": "user", "content": f"Extract as JSON: order {1000 + 37 * n} of {name}, to be sent to Lyon."}],
            schema=schema, max_new_tokens=64,
        )
        for n, name in enumerate((CUSTOMERS * questions)[:questions])
    ]  # fmt: skip
    found["free_text"] = [
        GenerationRequest(
            messages=[{"role": "user", "content": f"Tell a story about {topic}, number {n}."}], max_new_tokens=96,
            temperature=0.8, seed=n, ignore_eos=True,
        )
        for n, topic in enumerate((TOPICS * questions)[:questions])
    ]  # fmt: skip
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--home", required=True)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base, registry = resolve_base(options.base), AdapterRegistry(Path(options.home))
    payload: dict[str, Any] = {}
    for kind, asked in requests(options.questions).items():
        ratios, speeds = [], []
        for _ in range(options.rounds):
            # Fresh engines: what was answered in a round before would be known in the next.
            engines = [
                InferenceEngine.from_base(base.folder, registry=registry, guess=guess) for guess in (True, False)
            ]
            try:
                for engine in engines:
                    engine.generate(GenerationRequest(prompt="warm", adapter=asked[0].adapter, max_new_tokens=4))
                seconds = [0.0, 0.0]
                written = 0
                for request in asked:
                    answers = []
                    for which, engine in enumerate(engines):
                        started = time.perf_counter()
                        answers.append(engine.generate(request))
                        seconds[which] += time.perf_counter() - started
                    assert answers[0].token_ids == answers[1].token_ids, "answers are the same with and without"
                    written += len(answers[0].token_ids)
                status = engines[0].status()
            finally:
                for engine in engines:
                    engine.close()
            ratios.append(seconds[1] / seconds[0])
            speeds.append(written / seconds[0])
        payload[kind] = {
            "times_the_speed_without": statistics.median(ratios), "tokens_per_second": statistics.median(speeds),
            "guessed": status.guessed, "guessed_right": status.guessed_right, "rounds": ratios,
        }  # fmt: skip
        print(kind, json.dumps(payload[kind]), flush=True)
    write_result("serving_guesses", payload)


if __name__ == "__main__":
    main()
