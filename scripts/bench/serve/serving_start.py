"""What the proof at start costs: beside loading a base, when it is made and when its verdict is known."""

import statistics
import time
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import ResolvedBase, load_base_model
from adapterhub_lite.serving.model import proof
from adapterhub_lite.serving.model.runner import ModelRunner

ROWS = 18


def measure_start(base: ResolvedBase, scratch: Path, rounds: int = 3) -> dict[str, Any]:
    """Seconds to load a base, to make it ready to compute, and what the proof adds: the first time, and with its verdict."""
    taken: dict[str, list[float]] = {"load": [], "make_ready": [], "proof": [], "known_verdict": []}
    ModelRunner(load_base_model(base.folder), rows=1)  # compiles the C code
    for round_ in range(rounds):
        times = {}
        for way in ("make_ready", "proof", "known_verdict"):
            started = time.perf_counter()
            model = load_base_model(base.folder)
            loaded = time.perf_counter()
            if way == "make_ready":
                ModelRunner(model, rows=ROWS)
                times["load"] = loaded - started
            else:
                proof._verdicts.clear()
                proof.proven(model, base.fingerprint, scratch / str(round_), rows=ROWS)
            times[way] = time.perf_counter() - loaded
        for way in ("proof", "known_verdict"):
            times[way] -= times["make_ready"]
        for name, value in times.items():
            taken[name].append(value)
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    whole = seconds["load"] + seconds["make_ready"]
    return {"seconds": seconds, "parts_of_the_start": {way: seconds[way] / whole for way in ("proof", "known_verdict")}}
