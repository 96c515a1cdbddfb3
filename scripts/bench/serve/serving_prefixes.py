"""What it saves that beginnings are computed once: questions behind one long prefix, and the next turn of a chat."""

import statistics
import time
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.serving import GenerationRequest, InferenceEngine

ROWS = 16
PREFIX = 700  # tokens


def measure_prefixes(base: ResolvedBase, _scratch: Path, rounds: int = 3) -> dict[str, Any]:
    """Seconds of 16 questions behind 700 tokens, 16 new tokens each, and to the first token of a chat's second turn; with
    beginnings taken over, and without."""
    tokenizer = load_tokenizer(base.folder)
    words = tokenizer.encode("The rules of the house are these, and they hold for everybody who lives in it. " * 60)
    taken: dict[str, list[float]] = {}
    with InferenceEngine.from_base(base.folder, max_rows=ROWS, end_tokens=frozenset()) as engine:
        prefixes = engine._core._prefixes
        shares = prefixes._on
        for round_ in range(rounds + 1):
            for way, on in (("taken_over", shares), ("read_again", False)):
                prefixes._on = on
                # Another beginning in each round and way.
                beginning = f"{way} {round_}. " + str(tokenizer.decode(words[:PREFIX]))
                asked = [GenerationRequest(f"{beginning} Question {i}?", max_new_tokens=16) for i in range(ROWS)]
                started = time.perf_counter()
                engine.generate_many(asked)
                questions = time.perf_counter() - started
                turn = engine.generate(GenerationRequest(f"{beginning} Question 3? And then?", max_new_tokens=1))
                if round_:
                    taken.setdefault(f"questions_{way}", []).append(questions)
                    taken.setdefault(f"second_turn_{way}", []).append(turn.timings.first_token_seconds)
    seconds = {name: statistics.median(values) for name, values in taken.items()}

    def ratio(name: str) -> float:
        pairs = zip(taken[f"{name}_taken_over"], taken[f"{name}_read_again"], strict=True)
        return statistics.median(one / other for one, other in pairs)

    return {"seconds": seconds, "questions_ratio": ratio("questions"), "second_turn_ratio": ratio("second_turn")}
