"""A vLLM that is started here: with which words, waited for, kept running, ended; and what is said when it is not to be."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterRejectedError, ConfigurationError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.vllm.adapter_files import largest_rank
from adapterhub_lite.serving.vllm.opening import needed_rank
from adapterhub_lite.serving.vllm.process import END_WITH_US, VllmProcess, launch_of
from adapterhub_lite.serving.vllm.settings import EngineSettings
from tests.serving.api.served_process import ServedProcess, served_process

PRETEND = Path(__file__).parent / "pretend_process.py"
COMMAND = shlex.join([sys.executable, str(PRETEND)])


def launch(base: Path, **more: Any) -> Any:
    given = {"name": "tiny", "python": None, "command": COMMAND, "more": "", "max_rank": 8, "max_loras": 2, "slots": 4}
    return launch_of(base, **{**given, **more})


def test_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = launch(tmp_path, command=COMMAND, more="--dtype float32 --max-model-len=256").words(1234)
    first = len(END_WITH_US)
    assert words[first : first + 3] == [sys.executable, str(PRETEND), str(tmp_path)]
    assert "--host 127.0.0.1 --port 1234" in shlex.join(words) and words[-3:] == [
        "--dtype",
        "float32",
        "--max-model-len=256",
    ]
    words = launch(tmp_path, command="", python=Path(sys.executable)).words(1)
    assert words[first + 1 : first + 5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert launch(tmp_path, command="").words(1)[first : first + 3] == [str(program), "serve", str(tmp_path)]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"command": ""}, "no `vllm` on the path.*--vllm-python"),
        ({"command": "no-such-program serve"}, "not on the path"),
        ({"command": "'"}, "as a shell does"),
        ({"command": "", "python": Path("/nowhere/python")}, "no program"),
        ({"more": "--port 80 --trust-remote-code"}, "--port, --trust-remote-code in --vllm-args"),
        ({"more": "--api-key=abc"}, "--api-key in"),
    ],
)
def test_what_cannot_be_started_is_said(
    more: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if more.get("command") == "":
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=reason):
        launch(tmp_path, **more)


def test_one_that_ends_instead_of_serving_is_told_in_its_own_words(tiny_base: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"exit code 1\):\nValueError: no such device, and the key is \.\.\."):
        VllmProcess(launch(tiny_base, more="--fail"))


SAYING = "import os, sys; sys.exit('finds modules in ' + os.environ.get('PYTHONPATH', 'its own places'))"


def test_it_does_not_get_the_modules_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    saying = launch(tmp_path, command=shlex.join([sys.executable, "-c", SAYING]))
    for given, wanted in (({}, "its own places"), ({"PYTHONPATH": "/theirs"}, "/theirs")):
        with pytest.raises(ConfigurationError, match=f"finds modules in {wanted}"):
            VllmProcess(saying, given)


HEALTHY = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""
KEEPER = """
import pathlib, sys
from adapterhub_lite.serving.vllm.process import VllmProcess, launch_of
command = f"{sys.executable} {sys.argv[1]}"
launch = launch_of(pathlib.Path("/"), name="x", python=None, command=command, more="", max_rank=8, max_loras=1, slots=1)
print(VllmProcess(launch).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not END_WITH_US, reason="there is no setpriv: see `adapterhub-lite doctor`")
def test_it_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "healthy.py").write_text(HEALTHY)
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, tmp_path / "healthy.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert keeper.stdout is not None and keeper.stdin is not None
    child = Path(f"/proc/{keeper.stdout.readline().strip()}/stat")
    assert child.exists()
    keeper.kill()
    keeper.wait()
    ended = threading.Event()
    with suppress(OSError):  # it is gone
        while child.read_text().rpartition(")")[2].split()[0] != "Z":
            ended.wait(0.02)
    keeper.stdin.close()
    keeper.stdout.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_known_whether_it_computes_on_a_cpu(device: str, tmp_path: Path) -> None:
    told = f"INFO Initializing a V1 LLM engine with config: {'x' * 600}, device_config={device}, structured_outputs_config=y"
    (tmp_path / "healthy.py").write_text(f"print({told!r}, flush=True)\n{HEALTHY}")
    command = shlex.join([sys.executable, str(tmp_path / "healthy.py")])
    with VllmProcess(launch(tmp_path, command=command)) as process:
        assert process.on_cpu is (device == "cpu")


def test_one_that_ends_twice_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "healthy.py").write_text(HEALTHY)
    given_up, looked = threading.Event(), threading.Event()
    command = shlex.join([sys.executable, str(tmp_path / "healthy.py")])
    with VllmProcess(launch(tmp_path, command=command)) as process:
        process.on_end = given_up.set
        first = process.pid
        os.kill(first, signal.SIGKILL)
        while process.pid == first:
            looked.wait(0.02)
        assert process.restarts == 1 and not given_up.is_set()
        os.kill(process.pid, signal.SIGKILL)
        assert given_up.wait(60) and process.restarts == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"engine": "ftp://x"}, "wanted `vllm`, or addresses"),
        ({"engine": "http://user:pass@host:1"}, "without a path or a password"),
        ({"engine": "http://host:1/v1"}, "without a path"),
        ({"engine": "http://host:1", "vllm_python": Path("x")}, "--vllm-python is for"),
        ({"vllm_args": "--x"}, "--vllm-args is for"),
        ({"engine": "vllm", "cluster": True}, "give one of them"),
        ({"engine": "vllm", "engine_key": Path("x")}, "random key"),
        ({"engine": "vllm", "cache_memory": "1GB"}, "--cache-memory is for our own"),
        ({"engine": "vllm", "vllm_python": Path("x"), "vllm_command": "x"}, "give one of them"),
        ({"engine": "vllm", "engine_slots": 0}, "at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        EngineSettings(**given)


def test_the_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    settings = EngineSettings(engine="http://127.0.0.1:1, http://127.0.0.1:2", engine_key=path)
    assert settings.engine_urls == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    for content in (None, "", "two words"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigurationError, match="key"):
            settings.engine_secret()
    path.write_text("secret\n")
    assert settings.engine_secret() == "secret"


def test_the_rank_is_what_the_registry_needs(registry: AdapterRegistry, tiny_base: Path) -> None:
    base = resolve_base(tiny_base)
    assert needed_rank(registry, base, EngineSettings()) == 8
    assert needed_rank(registry, base, EngineSettings(adapters="event")) == 8
    assert largest_rank({}) == 1 and largest_rank({"a": 9, "b": 2}) == 16
    with pytest.raises(AdapterRejectedError, match="b was refused: it has rank 600"):
        largest_rank({"a": 9, "b": 600})


@pytest.fixture(scope="module")
def served(
    tiny_base: Path, registry: AdapterRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedProcess]:
    log = tmp_path_factory.mktemp("served") / "log"
    options = ("--engine", "vllm", "--vllm-command", COMMAND, "--drain-seconds", "0")
    with served_process(tiny_base, registry.home, log, *options) as server:
        yield server


def children(pid: int) -> list[int]:
    """The ids of the processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_serve_starts_it_restarts_it_when_it_is_killed_and_ends_it(
    served: ServedProcess, shared_engine: InferenceEngine, registry: AdapterRegistry
) -> None:
    wanted = shared_engine.generate(GenerationRequest(prompt="select the", adapter="sql@prod", max_new_tokens=8)).text
    body = {"model": "sql@prod", "prompt": "select the", "max_tokens": 8, "temperature": 0}

    def post() -> httpx.Response:
        return httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)

    found = post().json()
    assert found["choices"][0]["text"] == wanted
    assert found["receipt"]["adapter_digest"] == registry.resolve("sql@prod").digest
    (child,) = children(served.process.pid)
    os.kill(child, signal.SIGKILL)
    answers = [post()]
    # Asked until the new one serves, which may be at once; until then each answer says how it was.
    while answers[-1].status_code == 503:
        answers.append(post())
    assert answers[-1].status_code == 200 and answers[-1].json()["choices"][0]["text"] == wanted
    (again,) = children(served.process.pid)
    assert again != child
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert not Path(f"/proc/{again}").exists()
