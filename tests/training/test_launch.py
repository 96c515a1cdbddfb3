"""`train --devices` and its like: processes that are started, lost, and find each other, through the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i} times"}, {"role": "assistant", "content": "x" * (i % 9 + 1)}]}
        for i in range(32)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(home: Path, base: Path, rows: Path, *more: str, steps: int = 4) -> list[str]:
    settings = ["--steps", str(steps), "--batch-size", "4", "--rank", "4", "--save-steps", "2", "--max-length", "64"]
    return ["train", "times", "--base", str(base), "--data", str(rows), "--home", str(home), *settings, *more]


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *launcher, "-m", "adapterhub_lite", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def adapter_of(home: Path) -> dict[str, Any]:
    (path,) = home.glob("runs/times/*/adapter/adapter_model.safetensors")
    return load_file(path)


def workers_of(parent: int) -> dict[str, int]:
    """Rank -> process id of the children that carry a RANK."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text()
            if int(stat.rsplit(")", 1)[1].split()[1]) == parent:
                environment = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                found[environment["RANK"]] = int(entry.name)
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return found


@pytest.mark.slow
def test_two_devices_add_one_version(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    out, _ = finish(start(*command(tmp_path / "home", tiny_base, rows, "--devices", "2", "--json")))
    assert json.loads(out)["version"] == 1


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_and_the_run_goes_on(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    whole = command(tmp_path / "whole", tiny_base, rows, "--devices", "2", steps=40)
    killed = command(tmp_path / "killed", tiny_base, rows, "--devices", "2", steps=40)
    finish(start(*whole))
    process = start(*killed)
    while not list((tmp_path / "killed").glob("runs/times/*/checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    os.kill(workers_of(process.pid)["1"], signal.SIGKILL)
    _, err = finish(process, code=2)
    assert "Process 1 of 2 was killed by SIGKILL" in err and "Traceback" not in err.splitlines()[-1]
    assert not list((tmp_path / "killed").glob("runs/times/*/adapter"))
    finish(start(*killed))
    one, other = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "killed")
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.slow
def test_two_nodes_meet_on_loopback(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    port = free_port()
    meet = ("--nodes", "2", "--rendezvous", f"localhost:{port}", "--patience", "120")
    nodes = [start(*command(tmp_path / "home", tiny_base, rows, *meet)) for _ in range(2)]
    told = "".join(finish(node)[1] for node in nodes)
    assert told.count("times:1 (") == 1


@pytest.mark.slow
def test_a_node_that_waits_in_vain_says_so(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    meet = ("--nodes", "2", "--rendezvous", f"localhost:{free_port()}", "--patience", "5")
    _, err = finish(start(*command(tmp_path / "home", tiny_base, rows, *meet)), code=2)
    assert "2 nodes did not meet" in err


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_one_sentence(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    _, err = finish(start(*command(tmp_path / "home", tiny_base, rows, "--strategy", "fsdp", "--devices", "2")), 2)
    assert err.count("Accelerate leaves FSDP out on a CPU") == 1


@pytest.mark.slow
def test_accelerate_launch_runs_what_the_plan_wrote(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    plan = ("plan", str(tiny_base), "--devices", "2", "--preset", "ddp", "--write-accelerate-config", str(config))
    finish(start(*plan))
    assert yaml.safe_load(config.read_text())["distributed_type"] == "MULTI_CPU"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    _, err = finish(start(*command(tmp_path / "home", tiny_base, rows), launcher=launcher))
    assert err.count("times:1 (") == 1


def test_several_nodes_want_a_place_to_meet(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    from typer.testing import CliRunner

    from adapterhub_lite.cli.main import build_app

    done = CliRunner().invoke(build_app(), command(tmp_path / "home", tiny_base, rows, "--nodes", "2"))
    assert "--rendezvous HOST:PORT" in str(done.exception)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
