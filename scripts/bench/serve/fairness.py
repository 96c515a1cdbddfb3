"""How long does a tenant wait for its first token while another fills the server, and what does that cost the other?

    python -m scripts.bench.serve.fairness [--base smollm2-135m] [--connections 32] [--seconds 20] [--rounds 3]

The server, the tenant A that keeps every connection busy, and the tenant B that asks for 5 tokens once a second are three
processes. A alone, B alone and both together take turns; figures are medians over rounds. Then 500 connections that send
nothing and 50 that send half a body are opened, and B asks again. Writes results/fairness.json.
"""

import argparse
import itertools
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from scripts.bench.report import write_result

NAME = "fairness"
PROMPT = "Write one sentence about a lighthouse keeper and the sea."


@contextmanager
def served(base: str, folder: Path) -> Iterator[tuple[int, str]]:
    """(process id, address) of `adapterhub-lite serve` with a key for each tenant."""
    keys = folder / "keys.json"
    keys.write_text(json.dumps({"keys": {"key-a": ["*"], "key-b": ["*"]}}))
    keys.chmod(0o600)
    command = [sys.executable, "-m", "adapterhub_lite", "serve", "--base", base, "--base-name", "base", "--port", "0"]
    command += ["--home", str(folder / "home"), "--keys", str(keys)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = next(line for line in server.stderr if "http://" in line)
            # What it logs from now on is read and forgotten, so that the pipe never fills.
            threading.Thread(target=lambda: list(server.stderr or ()), daemon=True).start()
            yield server.pid, re.findall(r"(http://[^/]+)/v1", line)[0]
        finally:
            server.terminate()


def ask(client: httpx.Client, key: str, tokens: int) -> list[float]:
    """Seconds from the request to each chunk of its answer, as long as the server takes it at all."""
    body = {"model": "base", "prompt": PROMPT, "max_tokens": tokens, "temperature": 1.0, "stream": True}
    began, at = time.perf_counter(), []
    headers = {"Authorization": f"Bearer {key}"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            time.sleep(0.05)
            return []
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                at.append(time.perf_counter() - began)
    return at


def saturate(url: str, connections: int, seconds: float) -> None:
    """Tenant A: prints how many tokens per second it got, and the median time between two of one answer."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    gaps: list[float] = []
    chunks = 0

    def one() -> None:
        nonlocal chunks
        with httpx.Client(base_url=url, timeout=300) as client:
            while time.monotonic() < end:
                at = ask(client, "key-a", 48)
                with lock:
                    chunks += len(at)
                    gaps.extend(after - before for before, after in itertools.pairwise(at))

    threads = [threading.Thread(target=one) for _ in range(connections)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {"tokens_per_second": chunks / (time.monotonic() - began), "step_seconds": statistics.median(gaps)}
    print(json.dumps(found))


@contextmanager
def tenant_a(url: str, options: argparse.Namespace) -> Iterator["subprocess.Popen[str]"]:
    """A as a process of its own."""
    command = [sys.executable, "-m", "scripts.bench.serve.fairness", "--saturate", url]
    command += ["--connections", str(options.connections), "--seconds", str(options.seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process


def first_tokens(client: httpx.Client, seconds: float) -> list[float]:
    """Tenant B: seconds to the first token, one request a second."""
    end, found = time.monotonic() + seconds, []
    while time.monotonic() < end:
        began = time.monotonic()
        found.append(ask(client, "key-b", 5)[0])
        time.sleep(max(0.0, began + 1 - time.monotonic()))
    return found


def flood(url: str, pid: int, client: httpx.Client) -> dict[str, float]:
    """550 connections that never finish a request: memory of the server, and B's first tokens meanwhile."""
    host, port = url.removeprefix("http://").split(":")

    def memory() -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024

    before, crowd = memory(), []
    for number in range(550):
        crowd.append(socket.create_connection((host, int(port)), timeout=30))
        if number < 50:
            crowd[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9999\r\n\r\n{")
    waits = first_tokens(client, 6)
    grown = memory() - before
    for one in crowd:
        one.close()
    return {"growth_bytes": grown, "first_token_seconds": statistics.median(waits)}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, in seconds and bytes."""
    a_alone, a_both, b_alone, b_both, steps = [], [], [], [], []
    with served(options.base, folder) as (pid, url), httpx.Client(base_url=url, timeout=300) as client:
        first_tokens(client, 2)
        for _ in range(options.rounds):
            b_alone += first_tokens(client, options.seconds / 2)
            with tenant_a(url, options) as alone:
                a_alone.append(json.loads(alone.communicate()[0])["tokens_per_second"])
            with tenant_a(url, options) as beside:
                time.sleep(options.seconds / 4)  # until it has filled the rows
                b_both += first_tokens(client, options.seconds / 2)
                found = json.loads(beside.communicate()[0])
                a_both.append(found["tokens_per_second"])
                steps.append(found["step_seconds"])
        flooded = flood(url, pid, client)
    median = statistics.median
    return {
        "base": options.base, "connections": options.connections, "rounds": options.rounds,
        "first_token_alone": median(b_alone), "first_token_beside": median(b_both),
        "first_token_beside_worst": max(b_both), "step_seconds": median(steps),
        # Below 0: within twice the time alone and one step.
        "beyond_twice_and_a_step": median(b_both) - 2 * median(b_alone) - median(steps),
        "a_tokens_per_second_alone": median(a_alone), "a_tokens_per_second_beside": median(a_both),
        "a_keeps": median(a_both) / median(a_alone), "flood": flooded,
    }  # fmt: skip


def main() -> None:
    """Measure and write, or be tenant A."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saturate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.saturate:
        return saturate(options.saturate, options.connections, options.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        write_result(NAME, measure(options, Path(scratch)))


if __name__ == "__main__":
    main()
