"""How fast and how small is the logits-free loss, compared with the full one and its peers in one paired run?

Every measured value is the median of rounds in which all contestants take turns. Peak is the growth of resident memory
above the inputs, their gradients included, in a child process each that does nothing else (CUDA: the allocator's).
A run replaces the problems it measured in results/loss.json and leaves the others; each keeps its own date, load and processor.

    python -m scripts.bench.train.loss                 # all problems, about 10 minutes on 2 cores
    python -m scripts.bench.train.loss --only frozen-half-masked lengths --rounds 7
    python -m scripts.bench.train.loss --tiles         # the sweep behind the tile size rule
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterhub_lite.loss_sizes import LIMITS, TileLimits
from adapterhub_lite.losses import LossOptions, linear_cross_entropy
from adapterhub_lite.losses.tiled import tiled_cross_entropy
from scripts.bench.report import RESULTS, describe_machine, write_result

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """One shape: tokens x vocabulary x columns, a share of masked tokens, and what is trained."""

    name: str
    tokens: int
    vocabulary: int
    columns: int
    masked: float = 0.0
    head_trained: bool = False
    dtype: torch.dtype = torch.bfloat16


PROBLEMS = (
    Problem("frozen-half-masked", 2048, 49152, 576, masked=0.5),
    Problem("frozen", 2048, 49152, 576),
    Problem("frozen-fp32-half-masked", 2048, 49152, 576, masked=0.5, dtype=torch.float32),
    Problem("frozen-large-vocabulary", 1024, 262144, 640),
    Problem("head-trained", 2048, 49152, 576, head_trained=True),
)
LENGTHS = (512, 1024, 2048, 4096, 8192)
GPU_PROBLEMS = (
    Problem("cce-paper", 8192, 256000, 2304, head_trained=True),
    Problem("cce-paper-frozen", 8192, 256000, 2304),
    Problem("long-frozen", 16384, 248320, 2048),
)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What the model classes of transformers do."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, with a chunk size, because without options it is the full one."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    loss: Tensor = F.linear_cross_entropy(hidden, weight, targets, options=options)
    return loss


def contestants(device: torch.device, only: str | None = None) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can run here, and why the others cannot; with `only`, other packages are not even imported."""
    found: dict[str, Loss] = {"ours": linear_cross_entropy, "full logits": full_logits}
    missing: dict[str, str] = {}
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_fused
    else:
        missing["torch linear_cross_entropy"] = f"torch {torch.__version__} has none"
    builders = {"ours, Triton": own_kernels, "TRL fused head": trl_fused_head}
    builders |= {"cut_cross_entropy": cut_cross_entropy, "Liger": liger}
    for name, build in builders.items():
        if only not in (None, name):
            continue
        try:
            found[name] = build()
        except ImportError as error:
            missing[name] = f"{type(error).__name__}: {error}"
    if device.type == "cpu":
        for name in ("ours, Triton", "cut_cross_entropy", "Liger"):
            found.pop(name, None)
            missing.setdefault(name, "its kernels need a GPU")
    return found, missing


def own_kernels() -> Loss:
    """Our Triton kernels."""
    import_module("triton")
    return lambda hidden, weight, targets: tiled_cross_entropy(hidden, weight, targets, LossOptions(), triton=True)


def trl_fused_head() -> Loss:
    """TRL's fused head as its trainer calls it: every position is scored where there is no Triton, then masked."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        mask = targets != -100
        outputs = ChunkedLogProbFunction.apply(hidden, weight, None, targets.clamp(min=0), 1.0, 32768, None, 1.0, ())
        return -outputs[0].masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)

    return loss


def cut_cross_entropy() -> Loss:
    """Apple's Cut Cross-Entropy."""
    from cut_cross_entropy import linear_cross_entropy as cce

    return lambda hidden, weight, targets: cce(hidden, weight, targets)


def liger() -> Loss:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def make_inputs(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets whose logits have a spread of about 2, as trained models have."""
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(problem.tokens, problem.columns, device=device, generator=draw).to(problem.dtype)
    weight = torch.empty(problem.vocabulary, problem.columns, device=device, dtype=problem.dtype)
    weight.normal_(std=2 / problem.columns**0.5, generator=draw)
    targets = torch.randint(problem.vocabulary, (problem.tokens,), device=device, generator=draw)
    targets[: round(problem.tokens * problem.masked)] = -100
    targets = targets[torch.randperm(problem.tokens, device=device, generator=draw)]
    return hidden.requires_grad_(), weight.requires_grad_(problem.head_trained), targets


def one_step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(seconds of a forward and a backward, the loss)."""
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    _synchronise(hidden.device)
    start = time.perf_counter()
    value = loss(hidden, weight, targets)
    value.backward()
    _synchronise(hidden.device)
    return time.perf_counter() - start, float(value.detach())


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(name: str, problem: Problem, device: torch.device) -> int:
    """Bytes above the inputs at the worst moment of one step, in a process of its own."""
    job = json.dumps({**vars(problem), "dtype": str(problem.dtype).removeprefix("torch.")})
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, job, device.type], capture_output=True, text=True, check=True
    )
    return int(done.stdout.strip().splitlines()[-1])


def print_peak(name: str, job: str, device: torch.device) -> None:
    """The child's side of `peak_of`."""
    fields = json.loads(job)
    problem = Problem(**{**fields, "dtype": getattr(torch, fields["dtype"])})
    loss = contestants(device, only=name)[0][name]
    one_step(loss, make_inputs(replace(problem, tokens=64, vocabulary=512), device))
    inputs = make_inputs(problem, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(loss, inputs)
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    one_step(loss, inputs)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(problem: Problem, rounds: int, device: torch.device) -> dict[str, Any]:
    """Time and peak of every contestant on one problem, in turns, and their ratios to the full logits."""
    losses, _ = contestants(device)
    inputs = make_inputs(problem, device)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    values = {}
    for round_number in range(rounds + 1):
        for name, loss in losses.items():
            taken, values[name] = one_step(loss, inputs)
            if round_number:
                seconds[name].append(taken)
    gradient = problem.vocabulary * problem.columns * problem.dtype.itemsize if problem.head_trained else 0
    rows: dict[str, dict[str, Any]] = {}
    for name in losses:
        peak = peak_of(name, problem, device)
        rows[name] = {
            "seconds_median": round(median(seconds[name]), 4),
            "seconds_all": [round(x, 4) for x in seconds[name]],
            "peak_bytes": peak,
            "peak_bytes_beyond_weight_gradient": peak - gradient,
            "loss": values[name],
        }
    full = rows["full logits"]
    for row in rows.values():
        row["time_to_full"] = round(row["seconds_median"] / full["seconds_median"], 3)
        mine, theirs = row["peak_bytes_beyond_weight_gradient"], full["peak_bytes_beyond_weight_gradient"]
        row["full_peak_to_this"] = round(theirs / max(1, mine), 2)
    described = {**vars(problem), "dtype": str(problem.dtype).removeprefix("torch.")}
    return {"problem": described, "contestants": rows, **_circumstances()}


def scale_with_length(rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Ours alone over growing numbers of tokens: time per token and peak beyond the gradients should stay the same."""
    rows = []
    inputs = {n: make_inputs(Problem(f"length-{n}", n, 49152, 576), device) for n in LENGTHS}
    seconds: dict[int, list[float]] = {n: [] for n in LENGTHS}
    for _ in range(rounds):
        for tokens, each in inputs.items():
            seconds[tokens].append(one_step(linear_cross_entropy, each)[0])
    for tokens in LENGTHS:
        peak = peak_of("ours", Problem(f"length-{tokens}", tokens, 49152, 576), device)
        middle = median(seconds[tokens])
        rows.append({"tokens": tokens, "seconds": middle, "us_per_token": middle / tokens * 1e6, "peak_bytes": peak})
    return rows


def sweep_tiles(problem: Problem, rounds: int, device: torch.device) -> list[dict[str, float]]:
    """The measurement behind the tile size rule: every pair of sides, in turns; best and median."""
    inputs = make_inputs(problem, device)
    sides = [(t, v) for t in (256, 512, 1024, 2048) for v in (512, 1024, 2048, 4096, 8192) if t <= problem.tokens]
    seconds: dict[tuple[int, int], list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for tokens, vocabulary in sides:
            LIMITS["cpu"] = TileLimits(tokens, tokens * vocabulary, LIMITS["cpu"].panel)
            seconds[tokens, vocabulary].append(one_step(linear_cross_entropy, inputs)[0])
    return [
        {"tokens": t, "vocabulary": v, "best": round(min(x), 4), "median": round(median(x), 4)}
        for (t, v), x in seconds.items()
    ]


def main() -> None:
    """Measure the problems asked for and write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--tiles", action="store_true", help="sweep tile sizes instead")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, job, kind = arguments.peak
        print_peak(name, job, torch.device(kind))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = GPU_PROBLEMS if device.type == "cuda" else PROBLEMS
    problems = [p for p in known if p.name in (arguments.only or p.name)]
    if arguments.tiles:
        swept = {p.name: sweep_tiles(p, arguments.rounds, device) for p in problems}
        print(write_result("loss_tiles", {"tiles": swept}))
        return
    path = RESULTS / "loss.json"
    found: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for problem in problems:
        found[problem.name] = compare(problem, arguments.rounds, device)
        print_result(found[problem.name])
    if "lengths" in (arguments.only or ["lengths"]):
        found["lengths"] = {"ours": scale_with_length(arguments.rounds, device), **_circumstances()}
        for row in found["lengths"]["ours"]:
            print(f"  {row['tokens']:6d} tokens {row['seconds']:.3f} s {row['peak_bytes'] / 1e6:.0f} MB")
    print(write_result("loss", {"results": found, "left_out": contestants(device)[1]}))
    plot([found[p.name] for p in (*PROBLEMS, *GPU_PROBLEMS) if p.name in found], RESULTS / "loss.png")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and MB of each contestant, one group of bars per problem, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5))
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    for axis, key, title in zip(
        axes, ("seconds_median", "peak_bytes"), ("time (s, median)", "peak above the inputs (MB)"), strict=True
    ):
        for offset, name in enumerate(names):
            found = [(i, r["contestants"][name][key]) for i, r in enumerate(results) if name in r["contestants"]]
            heights = [value / (1e6 if key == "peak_bytes" else 1) for _, value in found]
            axis.bar([i + offset * 0.2 for i, _ in found], heights, 0.19, label=name)
        axis.set_xticks([i + 0.3 for i in range(len(results))])
        axis.set_xticklabels([r["problem"]["name"] for r in results], rotation=15, fontsize=8)
        axis.set_title(title)
        axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _circumstances() -> dict[str, Any]:
    machine = {k: v for k, v in describe_machine().items() if k in ("load_average", "processor", "gpu", "threads")}
    return {"measured": datetime.now(UTC).isoformat(timespec="seconds"), **machine}


def print_result(result: dict[str, Any]) -> None:
    """One line per contestant."""
    print(result["problem"]["name"])
    for contestant, row in result["contestants"].items():
        print(
            f"  {contestant:28s} {row['seconds_median']:8.3f} s ({row['time_to_full']:.2f} of full)"
            f" {row['peak_bytes'] / 1e6:8.0f} MB (1/{row['full_peak_to_this']:.1f}) loss {row['loss']:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
