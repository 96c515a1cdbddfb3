"""`train --devices` and its like: processes that are started, lost, and find each other, through the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from adapterhub_lite.cli.main import build_app
from tests.checkout import ROOT


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


def write_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
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
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err[-3000:]
    return out, err


def begin(*arguments: str, home: Path) -> "subprocess.Popen[str]":
    """Start a run and wait for its first checkpoint."""
    process = start(*arguments)
    while not list(home.glob("runs/times/*/checkpoint-*")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    return process


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


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The home of a run of 40 steps on two devices that nothing happened to, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    out, _ = finish(
        start(*command(folder / "home", tiny_base, write_rows(folder), "--devices", "2", "--json", steps=40))
    )
    return folder / "home", json.loads(out)


@pytest.mark.slow
def test_two_devices_add_one_version(whole: tuple[Path, dict[str, Any]]) -> None:
    home, printed = whole
    assert printed["version"] == 1
    assert printed["training"]["preset"] == "ddp", "of all that fits, auto takes the first"
    assert len(list(home.glob("runs/times/*"))) == 1


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_and_the_run_goes_on(
    tiny_base: Path, tmp_path: Path, rows: Path, whole: tuple[Path, dict[str, Any]]
) -> None:
    killed = command(tmp_path / "killed", tiny_base, rows, "--devices", "2", steps=40)
    process = begin(*killed, home=tmp_path / "killed")
    os.kill(workers_of(process.pid)["1"], signal.SIGKILL)
    _, err = finish(process, code=2)
    assert "Process 1 of 2 was killed by SIGKILL" in err and "Traceback" not in err.splitlines()[-1]
    assert not list((tmp_path / "killed").glob("runs/times/*/adapter"))
    finish(start(*killed))
    one, other = adapter_of(whole[0]), adapter_of(tmp_path / "killed")
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "Stopped. "), (signal.SIGINT, 130, "Stopped. ")]
)
def test_a_run_that_is_told_to_stop_says_so(
    number: signal.Signals, code: int, said: str, tiny_base: Path, tmp_path: Path, rows: Path
) -> None:
    process = begin(*command(tmp_path, tiny_base, rows, "--devices", "2", steps=4000), home=tmp_path)
    workers = workers_of(process.pid).values()
    process.send_signal(number)
    _, err = finish(process, code=code)
    assert said in err and "SignalException" not in err
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


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
    assert "2 nodes did not meet" in err and "frame #" not in err and "Traceback" not in err


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_one_sentence(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    _, err = finish(start(*command(tmp_path / "home", tiny_base, rows, "--strategy", "fsdp", "--devices", "2")), 2)
    assert err.count("Accelerate leaves FSDP out on a CPU") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_accelerate_launch_runs_what_the_plan_wrote(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    plan = ["plan", str(tiny_base), "--devices", "2", "--preset", "zero3", "--write-accelerate-config", str(config)]
    assert CliRunner().invoke(build_app(), plan).exit_code == 0
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    # Other rows and accumulation than the plan's: those are the run's own.
    run = command(tmp_path / "home", tiny_base, rows, "--accumulation", "2", "--json")
    out, _ = finish(start(*run, launcher=launcher))
    # DeepSpeed's launcher speaks on standard output before.
    printed = json.loads(out[out.index("{\n") :])
    assert printed["training"]["preset"] == "zero3" and printed["version"] == 1


def test_several_nodes_want_a_place_to_meet(tiny_base: Path, tmp_path: Path, rows: Path) -> None:
    done = CliRunner().invoke(build_app(), command(tmp_path / "home", tiny_base, rows, "--nodes", "2"))
    assert "--rendezvous HOST:PORT" in str(done.exception)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
