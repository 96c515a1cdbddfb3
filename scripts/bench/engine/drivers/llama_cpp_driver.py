"""Answers the questions of `peers` by llama.cpp's server: `llama_cpp_driver.py LLAMA_SERVER MODEL.gguf ADAPTER.gguf...`."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from scripts.bench.engine.drivers.lines import Question, by_adapter, quiet_output, serve

ROWS, CONTEXT = 16, 2048


def is_ready(client: httpx.Client) -> bool:
    """Whether the server has loaded its model."""
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def main() -> None:
    """Read requests until there are no more."""
    out = quiet_output()
    server, model, *adapters = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lora = ["--lora-init-without-apply", "--lora", ",".join(adapters)] if adapters else []
    process = subprocess.Popen(
        [
            server, "--model", model, "--host", "127.0.0.1", "--port", str(port), "--parallel", str(ROWS), "--ctx-size",
            str(ROWS * CONTEXT), "--kv-unified", "--threads", "2", "--threads-batch", "2", "--flash-attn", "on", *lora,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = client.post("/completion", json=body).raise_for_status().json()
        return found

    try:
        while not is_ready(client):
            assert process.poll() is None, "llama-server ended"
            time.sleep(0.2)
        pool = ThreadPoolExecutor(ROWS)

        def answer(question: Question) -> int:
            tokens = 0
            for number, prompts in by_adapter(question):  # slots of different adapters are never one batch
                scales = [{"id": n, "scale": float(n == number)} for n in range(len(adapters))]
                bodies = [
                    {"prompt": ids, "n_predict": question["new"], "temperature": 0.0, "ignore_eos": True,
                     "cache_prompt": bool(question.get("shared")), "lora": scales}
                    for ids in prompts
                ]  # fmt: skip
                # A slot knows what it has read itself, and nobody else does.
                one_slot = question.get("shared")
                told = map(complete, [{**b, "id_slot": 0} for b in bodies]) if one_slot else pool.map(complete, bodies)
                tokens += sum(int(one["tokens_predicted"]) for one in told)
            return tokens

        serve(out, answer, process=process.pid)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
