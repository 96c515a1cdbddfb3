"""How fast many adapters are served from one base, side by side with the other ways to do it on this machine.

    python -m scripts.bench.serve.serving [--part PART...] [--base smollm2-135m]

Writes results/serving_<part>.json. Every comparison is interleaved in one run; figures are medians unless named.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.bases import ResolvedBase, load_base_model, load_tokenizer, resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from scripts.bench.report import write_result
from scripts.bench.serve.serving_adapters import write_random_adapter
from scripts.bench.serve.serving_families import measure_families, measure_hybrids
from scripts.bench.serve.serving_memory import measure_cycles, measure_memory, measure_requests
from scripts.bench.serve.serving_peers import Peft, transformers_batch, transformers_continuous

Figures = dict[str, Any]
ROWS = 16
CONTEXT = 64
PROMPT = "Tell me a long story about the number {} and what it did on a rainy day in the mountains."


def open_engine(base: ResolvedBase, **options: Any) -> InferenceEngine:
    """An engine that writes every answer to its full length, so that all ways make the same number of tokens."""
    return InferenceEngine.from_base(base.folder, max_rows=ROWS, end_tokens=frozenset(), **options)


def make_adapters(base: ResolvedBase, ranks: list[int], scratch: Path) -> list[Path]:
    """One random adapter a rank, each of its own."""
    made = []
    for seed, rank in enumerate(ranks):
        made.append(write_random_adapter(base.folder, scratch / f"adapter-{seed}-{rank}", seed=seed, rank=rank))
    return made


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run the ways in turn, `rounds` times each after one for warmth; return the median seconds of each."""
    return {name: statistics.median(values) for name, values in rounds_of(ways, rounds).items()}


def rounds_of(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run the ways in turn, `rounds` times each after one for warmth; return the seconds of each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_:
                taken[name].append(time.perf_counter() - started)
    return taken


def measure_steps(base: ResolvedBase, scratch: Path) -> Figures:
    """Seconds of one decode step of 16 rows with 64 tokens of context: base, ours with 16 adapters, PEFT's ways."""
    folders = make_adapters(base, [16] * ROWS, scratch)
    ways: dict[str, Callable[[], object]] = {}
    engines = {
        "base": open_engine(base),
        "16_adapters": open_engine(base),
        "16_adapters_without_compiler": open_engine(base, native=False),
    }
    for name, engine in engines.items():
        runner = engine._runner
        with torch.inference_mode():
            for row, folder in enumerate(folders if name != "base" else ()):
                runner.lora.place(row, engine._pool.route(folder).parts)
        runner.forward(pack([RowSlice(row, 0, list(range(100, 100 + CONTEXT))) for row in range(ROWS)]))
        step = pack([RowSlice(row, CONTEXT, [5]) for row in range(ROWS)])
        ways[f"ours_{name}"] = lambda runner=runner, step=step: runner.forward(step)  # type: ignore[misc]
    peft = Peft(base.folder, folders)
    ways["transformers_base"] = peft.step(None, ROWS, CONTEXT)
    ways["peft_one_adapter_for_all"] = peft.step(0, ROWS, CONTEXT)
    ways["peft_adapter_names_16"] = peft.step(list(range(ROWS)), ROWS, CONTEXT)
    taken = rounds_of(ways, rounds=20)
    for engine in engines.values():
        engine.close()

    def ratio(way: str, other: str) -> float:
        # Round by round: what else the machine does in a round slows both.
        return statistics.median(a / b for a, b in zip(taken[way], taken[other], strict=True))

    return {
        "seconds": {name: statistics.median(values) for name, values in taken.items()},
        "fastest_seconds": {name: min(values) for name, values in taken.items()},
        "ours_over_own_base": ratio("ours_16_adapters", "ours_base"),
        "without_compiler_over_own_base": ratio("ours_16_adapters_without_compiler", "ours_base"),
        "ours_over_transformers_base": ratio("ours_16_adapters", "transformers_base"),
        "ours_over_peft_mixed": ratio("ours_16_adapters", "peft_adapter_names_16"),
    }


def _requests(count: int, tokens: int, adapters: list[Path] | None) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            messages=[{"role": "user", "content": PROMPT.format(i)}],
            adapter=adapters[i % len(adapters)] if adapters else None,
            max_new_tokens=tokens,
        )
        for i in range(count)
    ]


def measure_throughput(base: ResolvedBase, scratch: Path) -> Figures:
    """Tokens per second of 16 concurrent requests over 8 adapters of ranks 4, 8 and 16; 24 new tokens each."""
    new = 24
    folders = make_adapters(base, [4, 8, 16, 8, 4, 16, 8, 16], scratch)
    tokenizer = load_tokenizer(base.folder)
    engine = open_engine(base)
    mixed, plain = _requests(ROWS, new, folders), _requests(ROWS, new, None)
    chats = [
        tokenizer.apply_chat_template(list(r.messages or ()), add_generation_prompt=True, tokenize=False) for r in plain
    ]
    prompts = [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]
    peft = Peft(base.folder, folders)
    model = load_base_model(base.folder)
    fast = interleave(
        {
            "ours_8_adapters": lambda: engine.generate_many(mixed),
            "ours_base": lambda: engine.generate_many(plain),
            "transformers_continuous_base": lambda: transformers_continuous(base.folder, prompts, new),
            "transformers_generate_base": lambda: transformers_batch(model, tokenizer, prompts, new),
            "peft_adapter_names": lambda: peft.mixed(tokenizer, prompts, new),
        },
        rounds=3,
    )
    # A sixteenth of the work of the others a round: one request after another takes too long for more.
    slow = interleave({"peft_set_adapter_one_by_one": lambda: peft.one_by_one(prompts[:4], new)}, rounds=2)
    engine.close()
    rates = {name: ROWS * new / seconds for name, seconds in fast.items()}
    rates |= {name: 4 * new / seconds for name, seconds in slow.items()}
    return {
        "tokens_per_second": rates,
        "over_peft_one_by_one": rates["ours_8_adapters"] / rates["peft_set_adapter_one_by_one"],
        "over_transformers_continuous": rates["ours_8_adapters"] / rates["transformers_continuous_base"],
        "note": "transformers' continuous batching has no adapters: its figure is for the base alone",
    }


def measure_many(base: ResolvedBase, scratch: Path) -> Figures:
    """Tokens per second of 32 requests in 16 rows over 1, 8 and 64 adapters of rank 8, all resident; 48 new tokens each."""
    requests, new = 32, 48
    folders = make_adapters(base, [8] * 64, scratch)
    engine = open_engine(base)
    for folder in folders:
        engine.load(folder)
    sets = {str(n): folders[:n] for n in (1, 8, 64)}
    ways = {
        name: (lambda chosen=chosen: engine.generate_many(_requests(requests, new, chosen)))
        for name, chosen in sets.items()
    }
    taken = rounds_of(ways, rounds=5)
    read = sum(result.usage.prompt_tokens for result in engine.generate_many(_requests(requests, 1, None)))
    engine.close()
    rates = {name: requests * new / statistics.median(values) for name, values in taken.items()}
    # Round by round, against one adapter: what else the machine does in a round slows all three.
    slower = {name: statistics.median(a / b for a, b in zip(taken[name], taken["1"], strict=True)) for name in sets}
    return {
        "tokens_per_second_by_adapters": rates,
        "spread": max(slower.values()) / min(slower.values()) - 1,
        "seconds_of_each_round": taken,
        "tokens_written_each_time": requests * new,
        "tokens_read_each_time": read,
    }


def measure_switching(base: ResolvedBase, scratch: Path) -> Figures:
    """Milliseconds from an alias to a row that is routed for its next step, 2 and 64 residents, compiled and not; and
    from disk to routed for a 5 MB adapter."""
    folders = make_adapters(base, [8] * 64, scratch)
    registry = AdapterRegistry(scratch / "home")
    for i, folder in enumerate(folders):
        registry.add(folder, f"task-{i}", base=base)
        registry.set_alias(f"task-{i}", "prod", version=1)
    names = [f"task-{i}@prod" for i in range(len(folders))]
    step = pack([RowSlice(0, 0, [5])])
    figures: Figures = {}
    for way, native in (("", None), ("_without_compiler", False)):
        with open_engine(base, native=native, registry=registry) as engine, torch.inference_mode():

            def switch(name: str, engine: InferenceEngine = engine) -> tuple[float, float]:
                started = time.perf_counter()
                route = engine._pool.route(name)
                looked = 1e3 * (time.perf_counter() - started)
                engine._runner.lora.place(0, route.parts)
                engine._runner.lora.begin(step)
                routed = 1e3 * (time.perf_counter() - started)
                engine._runner.lora.leave(0)
                route.release()
                return looked, routed

            for count in (2, 64):
                for name in names[:count]:
                    engine.load(name)
                looked, routed = zip(*(switch(names[i % count]) for i in range(1000)), strict=True)
                figures[f"{count}_residents{way}_ms"] = {"look_up": _spread(looked), "routed": _spread(routed)}
            loads = []
            for _ in range(2):
                for name in names:
                    engine.unload(name)
                    loads.append(switch(name)[1])
            figures[f"disk_to_routed{way}_ms"] = _spread(loads)
    figures["adapter_bytes"] = (folders[0] / "adapter_model.safetensors").stat().st_size
    peft = Peft(base.folder, folders[:16])
    figures["peft_set_adapter_16_ms"] = _spread([1e3 * peft.switch(i % 16) for i in range(48)])
    return figures


def _spread(values: Sequence[float]) -> Figures:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def measure_first_token(base: ResolvedBase, scratch: Path) -> Figures:
    """Seconds to the first token of a short prompt, alone and beside 15 requests that write, asked at random moments."""
    folders = make_adapters(base, [8] * 8, scratch)
    short = GenerationRequest(prompt="Once upon a time", adapter=folders[0], max_new_tokens=1)
    dice = random.Random(0)

    def ask(engine: InferenceEngine) -> float:
        # Whoever asks as soon as the last answer is there always meets the beginning of a step.
        time.sleep(dice.uniform(0.05, 0.35))
        return engine.generate(short).timings.first_token_seconds

    with open_engine(base) as engine:
        for _ in range(3):
            ask(engine)
        alone = [ask(engine) for _ in range(30)]
        running = [engine.submit(request) for request in _requests(ROWS - 1, 800, folders)]
        streams = [iter(handle) for handle in running]
        for stream in streams:
            next(stream)
        loaded = [ask(engine) for _ in range(30)]
        still = engine.status().running
        for handle in running:
            handle.cancel()
    if still != ROWS - 1:
        raise RuntimeError(f"only {still} requests were still writing at the end, wanted {ROWS - 1}")
    ratio = statistics.median(loaded) / statistics.median(alone)
    return {"alone_seconds": _spread(alone), "beside_15_seconds": _spread(loaded), "ratio": ratio}


PARTS: dict[str, Callable[[ResolvedBase, Path], Figures]] = {
    "steps": measure_steps,
    "throughput": measure_throughput,
    "many": measure_many,
    "switching": measure_switching,
    "first_token": measure_first_token,
    "memory": measure_memory,
    "cycles": measure_cycles,
    "requests": measure_requests,
    "families": measure_families,
    "hybrids": measure_hybrids,
}


def main() -> None:
    """Measure the chosen parts and write one file each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--base", default="smollm2-135m")
    options = parser.parse_args()
    base = resolve_base(options.base)
    for part in options.part:
        with tempfile.TemporaryDirectory() as scratch:
            figures = PARTS[part](base, Path(scratch))
        path = write_result(f"serving_{part}", {"base": base.model_id, "question": PARTS[part].__doc__, **figures})
        print(path.read_text())


if __name__ == "__main__":
    main()
