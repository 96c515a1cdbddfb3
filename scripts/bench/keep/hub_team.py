"""Does the embedded hub serve a team? 20 clients download 100 MB at once, then 50 push small adapters at once.

    python -m scripts.bench.keep.hub_team [--clients 20] [--megabytes 100] [--pushes 50]

The hub runs in a process of its own, so that its memory is its own. The downloads are made the same way from Python's
`http.server`, which sends the same file from disk and does nothing else; the two take turns. Then the downloads once with
`huggingface_hub`, each into a cache of its own, and the pushes with it too. Writes results/hub_team.json.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from scripts.bench.report import write_result

NAME, REPO, FILE = "hub_team", "org/large", "adapter_model.safetensors"


@contextmanager
def started(command: list[str], first_line: str) -> Iterator[tuple[int, str]]:
    """(process id, the line that holds `first_line`) of a server in a process of its own."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.pid, next(line for line in server.stdout if first_line in line)
        finally:
            server.terminate()


def memory(pid: int, row: str) -> int:
    """A row of /proc/PID/status in bytes: VmRSS, or VmHWM for the peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(row))


def download(url: str, sha256: str) -> None:
    """Get a file, and check that it is the one with this sha256."""
    digest = hashlib.sha256()
    with httpx.stream("GET", url, follow_redirects=True, timeout=600) as answer:
        answer.raise_for_status()
        for block in answer.iter_raw(1 << 20):
            digest.update(block)
    assert digest.hexdigest() == sha256


def all_at_once(clients: int, task: Any, *columns: Any) -> tuple[float, int]:
    """Seconds until all are done, and how many failed."""
    began, failed = time.perf_counter(), 0
    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(task, *row) for row in zip(*columns, strict=True)]:
            failed += future.exception() is not None
    return time.perf_counter() - began, failed


def push(url: str, folder: Path, number: int) -> None:
    """One small adapter into a repository of its own, with a tag."""
    api = HfApi(endpoint=url, token=False)
    api.create_repo(f"org/small-{number}", exist_ok=True)
    api.upload_folder(repo_id=f"org/small-{number}", folder_path=folder)
    api.create_tag(f"org/small-{number}", tag="v1")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--pushes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    disable_progress_bars()
    constants.HF_HUB_DISABLE_XET = True
    with tempfile.TemporaryDirectory() as scratch:
        write_result(NAME, measure(Path(scratch), options))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, in bytes and seconds."""
    content = os.urandom(1_000_000) * options.megabytes
    (folder / "static").mkdir()
    (folder / "static" / FILE).write_bytes(content)
    small = folder / "small"
    small.mkdir()
    (small / FILE).write_bytes(os.urandom(400_000))
    (small / "README.md").write_text("# Small\n")
    hub = [sys.executable, "-m", "adapterhub_lite", "hub", "--data", str(folder / "hub"), "--port", "0", "--json"]
    plain = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder / "static"),
    ]
    with started(hub, '"url"') as (pid, line), started(plain, "Serving HTTP") as (_, serving):
        url = line.split('"')[3]
        api = HfApi(endpoint=url, token=False)
        api.create_repo(REPO)
        api.upload_file(path_or_fileobj=content, path_in_repo=FILE, repo_id=REPO)
        urls = {
            "hub": f"{url}/{REPO}/resolve/main/{FILE}",
            "http.server": f"http://127.0.0.1:{serving.split(' port ')[1].split()[0]}/{FILE}",
        }
        sha256 = hashlib.sha256(content).hexdigest()
        for address in urls.values():  # once before, so that nothing is made at the first request
            download(address, sha256)
        before = memory(pid, "VmRSS")
        seconds: dict[str, list[float]] = {name: [] for name in urls}
        failed = dict.fromkeys(urls, 0)
        for _ in range(options.rounds):
            for name, address in urls.items():
                took, errors = all_at_once(
                    options.clients, download, [address] * options.clients, [sha256] * options.clients
                )
                seconds[name].append(took)
                failed[name] += errors
        growth = memory(pid, "VmHWM") - before

        def fetch(number: int) -> None:
            hf_hub_download(REPO, FILE, endpoint=url, cache_dir=folder / "caches" / str(number))

        client_seconds, client_failed = all_at_once(options.clients, fetch, range(options.clients))
        pushed, not_pushed = all_at_once(
            options.pushes, push, [url] * options.pushes, [small] * options.pushes, range(options.pushes)
        )
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {
            "clients": options.clients, "bytes_each": len(content), "rounds": options.rounds,
            "seconds": medians, "failed": failed, "hub_to_plain": medians["hub"] / medians["http.server"],
            "hub_growth_bytes": growth, "hub_peak_bytes": memory(pid, "VmHWM"),
            "huggingface_hub": {"seconds": client_seconds, "failed": client_failed},
            "pushes": {"count": options.pushes, "seconds": pushed, "failed": not_pushed},
        }  # fmt: skip


if __name__ == "__main__":
    main()
