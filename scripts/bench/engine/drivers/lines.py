"""What the drivers share. Imports the standard library alone, because it runs in the environments of others too."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Question = dict[str, Any]


def quiet_output() -> int:
    """Send what an engine prints to standard error; returns the descriptor for the answers."""
    out = os.dup(1)
    os.dup2(2, 1)
    return out


def serve(out: int, answer: Callable[[Question], int], *, process: int | None = None) -> None:
    """Say that the engine is ready, then answer each line; `answer` returns how many tokens were written.

    `process` is whose memory is reported, this one's by default.
    """
    os.write(out, b'{"ready": true}\n')
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        tokens = answer(question)
        seconds = time.perf_counter() - started
        told = {"seconds": seconds, "tokens": tokens, "resident_bytes": resident_bytes(process or os.getpid())}
        os.write(out, (json.dumps(told) + "\n").encode())


def resident_bytes(process: int) -> int:
    """What a process has resident now, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def by_adapter(question: Question) -> list[tuple[int | None, list[list[int]]]]:
    """The prompts of a question by the number of their adapter, for engines that cannot mix."""
    groups: dict[int | None, list[list[int]]] = {}
    for ids, number in zip(question["prompts"], question["adapters"], strict=True):
        groups.setdefault(number, []).append(ids)
    return list(groups.items())
