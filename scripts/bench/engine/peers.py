"""The engine beside other ones on this machine, question by question, in turns in one run.

    python -m scripts.bench.engine.peers [--base smollm2-135m] [--rounds 3] [--vllm-python PYTHON]
        [--llama-server FILE --llama-source FOLDER] [--openvino-python PYTHON] [--converted FOLDER]

Each engine is a process of its own that stays loaded and answers the same token ids (`drivers/`); a peer that is not given is
left out, and the result says so. Every way writes the same number of tokens, greedily. No prefix is known from a round before,
because every round has prompts of its own. llama.cpp and OpenVINO read GGUF files that llama.cpp's own converter makes of the base
and of the adapters; --converted keeps them for another time. Quantised engines are asked what needs no adapters.
Writes results/serving_peers.json.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from adapterhub_lite.bases import resolve_base
from scripts.bench.report import write_result
from scripts.bench.serve.serving_adapters import write_random_adapter

ADAPTERS, ROWS = 8, 16
ASKED_ONCE = ("16_behind_700_shared_8_adapters",)  # takes some engines minutes
ROOT = Path(__file__).parents[3]
Question = dict[str, Any]
# What is compared with what: the way of ours, and its peers.
COMPARED = {
    "ours": ("vllm", "llama_cpp", "openvino"), "ours_int8": ("llama_cpp_int8", "openvino_int8"), "ours_int4": (),
}  # fmt: skip


def questions(seed: int) -> dict[str, Question]:
    """What is asked in one round: prompts of token ids, an adapter's number for each, tokens to write."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(100, 40_000) for _ in range(count)]

    none, mixed = [None] * ROWS, [row % ADAPTERS for row in range(ROWS)]

    def behind(prefix: list[int]) -> list[list[int]]:
        return [[*prefix, *ids(12)] for _ in range(ROWS)]

    return {
        "one_request": {"prompts": [ids(40)], "adapters": [None], "new": 64},
        "16_requests": {"prompts": [ids(40) for _ in none], "adapters": none, "new": 64},
        "16_requests_8_adapters": {"prompts": [ids(40) for _ in none], "adapters": mixed, "new": 64},
        "first_token_512": {"prompts": [ids(512)], "adapters": [None], "new": 1},
        "first_token_1500": {"prompts": [ids(1500)], "adapters": [None], "new": 1},
        "16_behind_700_shared": {"prompts": behind(ids(700)), "adapters": none, "new": 16, "shared": True},
        "16_behind_700_shared_8_adapters": {
            "prompts": behind(ids(700)), "adapters": mixed, "new": 16, "shared": True,
        },
    }  # fmt: skip


class Engine:
    """An engine behind its driver."""

    def __init__(self, python: str, driver: str, *arguments: object, base_only: bool = False) -> None:
        self.resident_bytes, self._base_only = 0, base_only
        module = f"scripts.bench.engine.drivers.{driver}_driver"
        self._process = subprocess.Popen(
            [python, "-m", module, *map(str, arguments)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._ready = False

    def takes(self, question: Question) -> bool:
        """Whether the question is for it."""
        return not self._base_only or set(question["adapters"]) == {None}

    def ask(self, question: Question) -> float:
        """Return the seconds that the answers took."""
        if not self._ready:
            self._line()
            self._ready = True
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        told = self._line()
        assert told["tokens"] == question["new"] * len(question["prompts"]), told
        self.resident_bytes = told["resident_bytes"]
        return float(told["seconds"])

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the driver ended: {self._process.args!r}"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Stop it; SIGTERM first, so that a driver stops what it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def convert(source: Path, base: Path, adapters: list[Path], folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Make GGUF files of the base, by kind of weights, and of the adapters."""

    def run(script: str, *arguments: object) -> None:
        command = [sys.executable, str(source / script), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)

    bases = {kind: folder / f"base-{kind}.gguf" for kind in ("bf16", "f16", "q8_0")}
    made = [folder / f"{adapter.name}.gguf" for adapter in adapters]
    for kind, file in bases.items():
        if not file.exists():
            run("convert_hf_to_gguf.py", base, "--outtype", kind, "--outfile", file)
    for adapter, file in zip(adapters, made, strict=True):
        if not file.exists():
            run("convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", "bf16", "--outfile", file)
    return bases, made


def start(options: argparse.Namespace, base: Path, adapters: list[Path], scratch: Path) -> dict[str, Engine]:
    """Start every engine that is there."""

    kinds = {"ours": "saved", "ours_int8": "int8", "ours_int4": "int4"}
    found = {
        name: Engine(sys.executable, "our", kind, base, *adapters, base_only=kind != "saved")
        for name, kind in kinds.items()
    }
    if options.vllm_python:
        found["vllm"] = Engine(options.vllm_python, "vllm", base, *adapters)
    if not options.llama_source:
        return found
    bases, files = convert(Path(options.llama_source), base, adapters, scratch)
    if options.llama_server:
        for name, kind in (("llama_cpp", "bf16"), ("llama_cpp_int8", "q8_0")):
            own = files if kind == "bf16" else []
            found[name] = Engine(
                sys.executable, "llama_cpp", options.llama_server, bases[kind], *own, base_only=not own
            )
    if options.openvino_python:
        for name, kind in (("openvino", "f16"), ("openvino_int8", "q8_0")):
            found[name] = Engine(options.openvino_python, "openvino", bases[kind], base_only=True)
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--llama-source", help="llama.cpp's sources, with its converters")
    parser.add_argument("--openvino-python")
    parser.add_argument("--converted", help="a folder for the GGUF files")
    options = parser.parse_args()
    base = resolve_base(options.base)
    with tempfile.TemporaryDirectory() as held:
        scratch = Path(held)
        folders = [write_random_adapter(base.folder, scratch / f"a{n}", seed=n, rank=16) for n in range(ADAPTERS)]
        converted = Path(options.converted or scratch)
        converted.mkdir(parents=True, exist_ok=True)
        engines = start(options, base.folder, folders, converted)
        taken: dict[str, dict[str, list[float]]] = {}
        left_out: dict[str, str] = {}
        resident: dict[str, int] = {}
        try:
            for round_ in range(options.rounds + 1):  # the first one warms up
                for name, question in questions(round_).items():
                    if (round_ == 0 and question.get("shared")) or (round_ > 1 and name in ASKED_ONCE):
                        continue
                    for way, engine in list(engines.items()):
                        if not engine.takes(question):
                            continue
                        try:
                            seconds = engine.ask(question)
                        except AssertionError:
                            left_out[way] = f"ended at {name}, round {round_}"
                            resident[way] = engines[way].resident_bytes
                            engines.pop(way).close()
                            continue
                        if round_:
                            taken.setdefault(name, {}).setdefault(way, []).append(seconds)
                print(
                    round_,
                    json.dumps({name: {w: v[-1] for w, v in by.items()} for name, by in taken.items()}),
                    flush=True,
                )
        finally:
            for engine in engines.values():
                engine.close()
    wanted = {peer for peers in COMPARED.values() for peer in peers}
    payload = {
        "seconds": {name: {w: statistics.median(v) for w, v in by.items()} for name, by in taken.items()},
        "ratios": {name: compared(by) for name, by in taken.items()},
        "resident_bytes": resident | {way: engine.resident_bytes for way, engine in engines.items()},
        "left_out": dict.fromkeys(wanted - set(engines), "not given") | left_out,
        "rounds": options.rounds,
    }
    print(json.dumps(payload, indent=1))
    write_result("serving_peers", payload)


def compared(by: dict[str, list[float]]) -> dict[str, float]:
    """Medians of our seconds over a peer's, round by round; below 1 ours is faster."""
    return {
        f"{ours}_over_{peer}": statistics.median(a / b for a, b in zip(by[ours], by[peer], strict=False))
        for ours, peers in COMPARED.items()
        for peer in peers
        if peer in by and ours in by
    }


if __name__ == "__main__":
    main()
