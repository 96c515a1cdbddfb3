"""What does a LoRA training step cost, and does it learn as well: ours, HF Trainer with PEFT, and TRL's SFTTrainer?

    python -m scripts.bench.train.train_step speed mixed  # seconds per step and peak memory, paired, alternating, medians
    python -m scripts.bench.train.train_step speed equal  # the same with rows of one length, where no padding is saved
    python -m scripts.bench.train.train_step scaling      # our step from 512 to 8 x 2048 tokens
    python -m scripts.bench.train.train_step quality 0    # held-out loss after 100 steps with seed 0, ours and HF's
    python -m scripts.bench.train.train_step quality 0 --trainer hf   # one of them, as a piece of its own

Each trainer runs in a process of its own, so that its peak is its own. Parts are merged into results/train_step.json,
each with the date and load of its own run: quality may be taken on a busy machine, seconds may not.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from scripts.bench.report import RESULTS, write_result

NAME = "train_step"
TRAINERS = ("ours", "hf", "trl")
WORDS = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "iris",
    "jade",
    "karst",
    "lunar",
    "maple",
)
BASE = "smollm2-135m"


def chats(count: int, seed: int, lengths: str) -> list[dict[str, Any]]:
    """Short chats with an answer that can be learned: the words of the question in reverse order."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        size = 9 if lengths == "equal" else min(30, max(3, round(chance.lognormvariate(2.1, 0.5))))
        words = [chance.choice(WORDS) for _ in range(size)]
        turns = [("system", "Answer briefly."), ("user", "Reverse: " + " ".join(words))]
        turns.append(("assistant", " ".join(reversed(words))))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """Run one trainer here and now; returns seconds per step, peak bytes and losses."""
    from scripts.bench.train import step_trainers

    return step_trainers.run(job)


def measure(**job: Any) -> dict[str, Any]:
    """Run one job in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(job["trainer"], {key: value for key, value in found.items() if key != "seconds"}, flush=True)
    return found


def speed(lengths: str, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate the trainers over `rounds`; the medians of steps and of peaks, and their ratios to HF's."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name in TRAINERS:
            runs[name].append(measure(trainer=name, lengths=lengths, steps=steps, rows=16, seed=0))
    table = {
        name: {
            "median_step_seconds": statistics.median(s for one in many for s in one["seconds"]),
            "step_seconds": [one["seconds"] for one in many],
            "peak_mib": statistics.median(one["peak_bytes"] for one in many) / 2**20,
            "last_loss": many[-1]["last_loss"],
        }
        for name, many in runs.items()
    }
    for row in table.values():
        row["times_faster_than_hf"] = table["hf"]["median_step_seconds"] / row["median_step_seconds"]
        row["share_of_hf_peak"] = row["peak_mib"] / table["hf"]["peak_mib"]
    return {f"speed_{lengths}": {"rows": 16, "tokens": runs["ours"][0]["tokens"], "rounds": rounds, "trainers": table}}


def scaling(longest: int) -> dict[str, Any]:
    """Our step with 8 rows of growing length; gradient checkpointing on, so that the longest fits anywhere."""
    points: list[dict[str, Any]] = []
    for length in (length for length in (64, 128, 256, 512, 1024, 2048) if length <= longest):
        one = measure(trainer="ours", lengths="filled", length=length, steps=2, rows=8, seed=0, checkpointing=True)
        points.append(
            {"tokens": 8 * length, "step_seconds": min(one["seconds"]), "peak_mib": one["peak_bytes"] / 2**20}
        )
    rates = [point["step_seconds"] / point["tokens"] * 1e6 for point in points]
    for point, rate in zip(points, rates, strict=True):
        point["microseconds_a_token"] = rate
    return {"scaling": {"rows": 8, "activation_checkpointing": True, "points": points}}


def draw(parts: dict[str, Any]) -> None:
    """Plot seconds per step and peak of each trainer, and our seconds per step over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    speeds = [name for name in ("speed_mixed", "speed_equal") if name in parts]
    for panel, key, label in zip(
        panels, ("median_step_seconds", "peak_mib"), ("seconds per step", "peak MiB"), strict=False
    ):
        for shift, name in enumerate(speeds):
            heights = [parts[name]["trainers"][trainer][key] for trainer in TRAINERS]
            places = [index + 0.4 * shift for index in range(len(TRAINERS))]
            panel.bar(places, heights, width=0.38, label=f"{name.removeprefix('speed_')} lengths")
        panel.set_xticks([index + 0.2 for index in range(len(TRAINERS))], TRAINERS)
        panel.set_ylabel(label)
        panel.legend()
    points = parts.get("scaling", {}).get("points", [])
    if points:
        tokens = [point["tokens"] for point in points]
        panels[2].plot(tokens, [point["step_seconds"] for point in points], "o-", label="ours")
        last = points[-1]["step_seconds"] / tokens[-1]
        panels[2].plot(tokens, [last * count for count in tokens], "--", label="proportional to tokens")
        panels[2].set(xlabel="tokens per step", ylabel="seconds per step")
        panels[2].legend()
    figure.suptitle("SmolLM2-135M, rank 8 on all linear layers, bf16, 16 short chats per step")
    figure.savefig(RESULTS / f"{NAME}.png", dpi=110)


def quality(seed: int, steps: int, rows: int, trainers: Sequence[str]) -> dict[str, Any]:
    """Held-out loss after `steps` steps of `trainers`: same rows, order, beginning and settings, one plain evaluation."""
    job = {"lengths": "mixed", "steps": steps, "rows": rows, "seed": seed, "evaluate": 64}
    found = {name: measure(trainer=name, **job) for name in trainers}
    keys = ("eval_loss_before", "eval_loss", "first_loss", "last_loss")
    return {
        f"quality_seed_{seed}": {"steps": steps, "rows": rows, "held_out_rows": 64}
        | {name: {key: one[key] for key in keys} for name, one in found.items()}
    }


def merge(part: dict[str, Any]) -> None:
    """Write `part` into the result, with the parts measured before and the other trainers of the same part."""
    path = RESULTS / f"{NAME}.json"
    parts = json.loads(path.read_bytes())["parts"] if path.exists() else {}
    for name, value in part.items():
        value |= {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "load_average": os.getloadavg()[0]}
        before = parts.get(name, {})
        same = name.startswith("quality") and all(before.get(key) == value[key] for key in ("steps", "rows"))
        parts[name] = {**before, **value} if same else value
        if {"ours", "hf"} <= set(parts[name]):
            parts[name]["ours_over_hf"] = parts[name]["ours"]["eval_loss"] / parts[name]["hf"]["eval_loss"]
    print(write_result(NAME, {"base": BASE, "rank": 8, "target_modules": "all-linear", "parts": parts}))
    draw(parts)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=("speed", "scaling", "quality", "job"))
    parser.add_argument("value", nargs="?", default="0", help="mixed or equal for speed, the seed for quality")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="steps per run: 6 for speed and 100 for quality when not given")
    parser.add_argument("--rows", type=int, default=4, help="for quality: chats per step")
    parser.add_argument("--trainer", choices=("ours", "hf"), help="for quality: this one alone")
    parser.add_argument("--longest", type=int, default=2048, help="tokens per row at which scaling ends")
    given = parser.parse_args()
    if given.part == "job":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_one({**json.loads(given.value), "folder": folder})))
    elif given.part == "speed":
        merge(speed(given.value, given.rounds, given.steps or 6))
    elif given.part == "scaling":
        merge(scaling(given.longest))
    else:
        merge(
            quality(
                int(given.value), given.steps or 100, given.rows, [given.trainer] if given.trainer else ["ours", "hf"]
            )
        )


if __name__ == "__main__":
    main()
