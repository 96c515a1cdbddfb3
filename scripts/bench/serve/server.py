"""What does HTTP cost on top of the engine? Requests per second and time to first token, 1 to 64 clients.

    python -m scripts.bench.serve.server [--base smollm2-135m] [--clients 1 4 16 64] [--rounds 5] [--steady-seconds 60]

Engine alone (threads that stream from it) and through HTTP (clients in a process of their own, over loopback) take
turns in one run on one engine; figures are medians of rounds. Then a steady load with the process's memory sampled.
`--clients` without a number, or `--steady-seconds 0`, leaves that part as it was measured before. Writes
results/server.json and results/server.png.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.api.settings import ServerSettings
from scripts.bench.report import RESULTS, write_result
from scripts.bench.serve.serving_adapters import write_random_adapter
from scripts.bench.serve.serving_memory import own_bytes

ADAPTERS, TOKENS, ROWS, WAVES = 4, 24, 16, 4
PROMPT = "Tell me a long story about the number {} and what it did on a rainy day in the mountains."
Shot = tuple[float, float]


def by_engine(engine: InferenceEngine, number: int) -> Shot:
    """(seconds to the first piece, seconds in all) of one request to the engine itself."""
    started = time.perf_counter()
    request = GenerationRequest(
        prompt=PROMPT.format(number), adapter=f"task-{number % ADAPTERS}", max_new_tokens=TOKENS
    )
    first = 0.0
    for _ in engine.stream(request):
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


async def by_http(port: int, number: int) -> Shot:
    """The same through HTTP, one connection a request; no more than the bytes are looked at, as a client costs too."""
    started = time.perf_counter()
    body = json.dumps({"model": f"task-{number % ADAPTERS}", "prompt": PROMPT.format(number), "max_tokens": TOKENS,
                       "temperature": 0, "stream": True}).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer, first = b"", 0.0
    while part := await reader.read(1 << 16):
        answer += part
        if not first and b"data: " in answer:
            first = time.perf_counter() - started
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in answer:
        raise RuntimeError(answer.decode())
    return first, time.perf_counter() - started


async def _each(port: int, numbers: Iterator[int]) -> list[Shot]:
    return [await by_http(port, number) for number in numbers]


async def _together(port: int, clients: int, requests: int) -> list[Shot]:
    numbers = iter(range(requests))
    found = await asyncio.gather(*(_each(port, numbers) for _ in range(clients)))
    return [shot for shots in found for shot in shots]


def http_load(port: int, clients: int, requests: int) -> dict[str, float]:
    """`load` through HTTP, by one thread."""
    started = time.perf_counter()
    shots = asyncio.run(_together(port, clients, requests))
    return figures(shots, time.perf_counter() - started)


def load(shoot: Callable[[int], Shot], clients: int, requests: int) -> dict[str, float]:
    """Requests per second and the median time to first token, with `clients` asking as fast as they are answered."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        shots = list(pool.map(shoot, range(requests)))
    return figures(shots, time.perf_counter() - started)


def figures(shots: list[Shot], seconds: float) -> dict[str, float]:
    """Requests per second, and the median time to first token."""
    return {"requests_per_second": len(shots) / seconds, "first_token_seconds": statistics.median(s[0] for s in shots)}


def now() -> str:
    """When a part was measured, as it may be older than the others."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def compare(engine: InferenceEngine, port: int, clients: list[int], rounds: int, pool: Any) -> list[dict[str, Any]]:
    """Both ways in turn, for each number of clients."""
    rows = []
    for count in clients:
        requests = max(8, WAVES * count)
        taken: dict[str, list[dict[str, float]]] = {"engine": [], "http": []}
        for _ in range(rounds):
            taken["engine"].append(load(lambda number: by_engine(engine, number), count, requests))
            taken["http"].append(pool.apply(http_load, (port, count, requests)))
        row: dict[str, Any] = {"clients": count, "requests": requests, "rounds": rounds, "measured": now()}
        for way, found in taken.items():
            row[way] = {key: statistics.median(one[key] for one in found) for key in found[0]}
        # Of each round by itself, as a machine is not equally fast for minutes.
        rates = [[one["requests_per_second"] for one in found] for found in taken.values()]
        row["overhead_by_round"] = [alone / through - 1 for alone, through in zip(*rates, strict=True)]
        row["overhead"] = statistics.median(row["overhead_by_round"])
        rows.append(row)
        print(row, flush=True)
    return rows


def steady(port: int, seconds: float, pool: Any) -> dict[str, Any]:
    """Memory of the serving process under 16 clients, sampled after each burst; growth is last tenth over first."""
    samples, requests, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        pool.apply(http_load, (port, 16, 64))
        requests += 64
        samples.append(own_bytes())
    part = max(1, len(samples) // 10)
    growth = statistics.median(samples[-part:]) / statistics.median(samples[:part]) - 1
    return {"seconds": seconds, "requests": requests, "growth": growth, "samples_bytes": samples, "measured": now()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Requests per second both ways, against the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way in ("engine", "http"):
        values = [row[way]["requests_per_second"] for row in rows]
        axes.plot([row["clients"] for row in rows], values, marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("clients")
    axes.set_ylabel(f"requests per second ({TOKENS} tokens each)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run everything and write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steady-seconds", type=float, default=60)
    given = parser.parse_args()
    base, path = resolve_base(given.base), RESULTS / "server.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {part: before[part] for part in ("clients", "steady") if part in before}
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(1) as pool:
        registry = AdapterRegistry(Path(scratch) / "home")
        for index in range(ADAPTERS):
            folder = write_random_adapter(base.folder, Path(scratch) / str(index), seed=index, rank=8)
            registry.add(folder, f"task-{index}", base=base)
        options: dict[str, Any] = {"registry": registry, "max_rows": ROWS, "end_tokens": frozenset()}
        with InferenceEngine.from_base(base.folder, **options) as engine:
            settings = ServerSettings(port=0, adapters=",".join(f"task-{index}" for index in range(ADAPTERS)))
            with ApiServer(engine, registry, settings) as server:
                port = int(server.url.rpartition(":")[2])
                pool.apply(http_load, (port, 2, 4))
                if given.clients:
                    kept["clients"] = compare(engine, port, given.clients, given.rounds, pool)
                if given.steady_seconds:
                    kept["steady"] = steady(port, given.steady_seconds, pool)
    plot(kept["clients"], RESULTS / "server.png")
    payload = {"base": base.model_id, "tokens_per_request": TOKENS, "adapters": ADAPTERS, "rows": ROWS, **kept}
    print(write_result("server", payload))


if __name__ == "__main__":
    main()
