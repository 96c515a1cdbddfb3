"""What does our server cost before vLLM? Requests per second and first tokens of 16 streams, with it and without.

    python -m scripts.bench.serve.vllm_front --vllm-python PYTHON [--base smollm2-135m] [--streams 16] [--rounds 6]

One vLLM is started; streams ask it for adapters by their digests, directly and through the server, with the same bodies, in
turn in one run. Both ways are warmed by a round that does not count, so that adapters are loaded and prompts are in vLLM's
prefix cache for both. The clients are a process of their own, and look at no more than bytes while they wait; that every
answer is whole is checked after a round. On a machine without a GPU everything computes on the same cores, vLLM too: what the
server uses, vLLM lacks. Figures are medians of rounds; the overhead is that of each round by itself. Writes
results/vllm_front.json.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.api.server import ApiServer
from adapterhub_lite.serving.vllm.opening import open_engine
from adapterhub_lite.serving.vllm.settings import EngineSettings
from scripts.bench.report import write_result
from scripts.bench.serve.server import PROMPT, Shot, figures
from scripts.bench.serve.serving_adapters import write_random_adapter

ADAPTERS, TOKENS, WAVES = 4, 48, 3


async def one(port: int, headers: str, model: str, number: int) -> tuple[Shot, bytes]:
    """(seconds to the first event, seconds in all) of one streamed completion of `TOKENS` tokens, and what came."""
    started = time.perf_counter()
    body = json.dumps({"model": model, "prompt": PROMPT.format(number), "max_tokens": TOKENS, "ignore_eos": True,
                       "temperature": 0, "stream": True}).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer, first = b"", 0.0
    while part := await reader.read(1 << 16):
        answer += part
        if not first and b"data: " in answer:
            first = time.perf_counter() - started
    writer.close()
    return (first, time.perf_counter() - started), answer


def check(answer: bytes) -> None:
    """Raise unless this is a whole stream of `TOKENS` tokens, a piece for each but for those that are half a character."""
    events = re.findall(rb"^data: (\{.*)$", answer, re.MULTILINE)
    choices = [choice for event in events for choice in json.loads(event).get("choices", ())]
    whole = b"data: [DONE]" in answer and len(choices) > TOKENS // 2 and choices[-1]["finish_reason"] == "length"
    if not answer.startswith(b"HTTP/1.1 200") or not whole:
        raise RuntimeError(answer.decode())


def streams(port: int, headers: str, models: list[str], count: int) -> dict[str, float]:
    """`count` clients that ask as fast as they are answered, `WAVES` times each on average."""

    async def each(numbers: Iterator[int]) -> list[tuple[Shot, bytes]]:
        return [await one(port, headers, models[number % len(models)], number) for number in numbers]

    async def together() -> list[tuple[Shot, bytes]]:
        numbers = iter(range(WAVES * count))
        return [one for own in await asyncio.gather(*(each(numbers) for _ in range(count))) for one in own]

    started = time.perf_counter()
    answered = asyncio.run(together())
    seconds = time.perf_counter() - started
    for _, answer in answered:
        check(answer)
    return figures([shot for shot, _ in answered], seconds)


def main() -> None:
    """Run both ways and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--home", type=Path, help="where the base is")
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--vllm-args", default="--enforce-eager --max-model-len 1024")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    base = resolve_base(given.base, home=given.home)
    settings = EngineSettings(port=0, engine="vllm", vllm_python=given.vllm_python, vllm_args=given.vllm_args)
    taken: dict[str, list[dict[str, float]]] = {"vllm": [], "front": []}
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(1) as pool:
        registry = AdapterRegistry(Path(scratch) / "home")
        for index in range(ADAPTERS):
            folder = write_random_adapter(base.folder, Path(scratch) / str(index), seed=index, rank=16)
            registry.add(folder, f"task-{index}", base=base)
        models = [registry.resolve(f"task-{index}").digest for index in range(ADAPTERS)]
        with open_engine(str(base.folder), settings, registry, home=registry.home, say=print) as engine:
            for model in models:
                engine.load(model)
            (backend,) = engine.backends
            version = httpx2.get(f"{backend.url}/version", trust_env=False).json()["version"]
            with ApiServer(engine, registry, settings) as server:
                ways = {
                    "vllm": (int(backend.url.rpartition(":")[2]), f"Authorization: {backend.authorization}\r\n"),
                    "front": (int(server.url.rpartition(":")[2]), ""),
                }
                for name, (port, headers) in ways.items():
                    print(name, pool.apply(streams, (port, headers, models, given.streams)), flush=True)  # warm
                for index in range(given.rounds):
                    # Who goes first changes, as a machine may be slower towards the end of a round.
                    for name in sorted(ways, reverse=bool(index % 2)):
                        taken[name].append(pool.apply(streams, (*ways[name], models, given.streams)))
                        print(name, taken[name][-1], flush=True)
    rates = [[round_["requests_per_second"] for round_ in found] for found in taken.values()]
    by_round = [alone / through - 1 for alone, through in zip(*rates, strict=True)]
    middle = {
        name: {key: statistics.median(round_[key] for round_ in found) for key in found[0]}
        for name, found in taken.items()
    }
    payload: dict[str, Any] = {
        "base": base.model_id, "vllm": version, "adapters": ADAPTERS, "streams": given.streams, "tokens_per_request": TOKENS,
        "requests": WAVES * given.streams, "rounds": given.rounds, "vllm_args": given.vllm_args, **middle,
        "overhead_by_round": by_round, "overhead": statistics.median(by_round),
    }  # fmt: skip
    print(write_result("vllm_front", payload))


if __name__ == "__main__":
    main()
