"""A vLLM of our own: started on the base's folder, on loopback, with a random key; waited for, kept running, ended.

When it ends by itself it is started once more on the same port; when that one ends within `FORGIVEN_SECONDS` too, the
engine has ended. Its output goes to our log.
"""

import contextlib
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx2

from adapterhub_lite.errors import ConfigurationError, ResourceError

logger = logging.getLogger("adapterhub.vllm")
FORGIVEN_SECONDS = 600.0
# Weights of a large model are read, kernels compiled and graphs captured meanwhile.
START_SECONDS = 1800.0
STOP_SECONDS = 20.0
LINES = 40
# In the line by which vLLM tells its whole configuration at its start.
ON_CPU = "device_config=cpu"


# Where we are killed, so is it: it would keep its GPU.
END_WITH_US = (_SETPRIV, "--pdeathsig", "TERM") if (_SETPRIV := shutil.which("setpriv")) else ()


@dataclass(frozen=True)
class Launch:
    """What to start: the words before vLLM's options, and these. `positional`: the model is a word of its own."""

    command: tuple[str, ...]
    options: tuple[str, ...]
    model: Path
    positional: bool

    def words(self, port: int) -> list[str]:
        """The command line for a port of loopback."""
        model = [str(self.model)] if self.positional else ["--model", str(self.model)]
        return [*END_WITH_US, *self.command, *model, "--host", "127.0.0.1", "--port", str(port), *self.options]


def launch_of(
    base: Path, *, name: str, python: Path | None, command: str, more: str, max_rank: int, max_loras: int, slots: int
) -> Launch:
    """How to start vLLM on the folder of a base.

    Raises:
        ConfigurationError: there is none to start, or a word cannot be read.
    """
    try:
        own, extra = shlex.split(command), shlex.split(more)
    except ValueError as error:
        raise ConfigurationError(f"--vllm-command and --vllm-args are read as a shell does: {error}.") from error
    if python is not None:
        if shutil.which(python) is None:
            raise ConfigurationError(
                f"--vllm-python is {str(python)!r}, which is no program. Give the Python beside vLLM."
            )
        own = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    elif own and shutil.which(own[0]) is None:
        raise ConfigurationError(f"--vllm-command starts {own[0]!r}, which is not on the path.")
    elif not own:
        found = shutil.which("vllm")
        if found is None:
            raise ConfigurationError(
                "There is no `vllm` on the path. Install vLLM in an environment of its own and give its Python with "
                "--vllm-python, or a container's command with --vllm-command, or the address of a running one with --engine."
            )
        own = [found, "serve"]
    taken = sorted({word.partition("=")[0] for word in extra} & OURS)
    if taken:
        raise ConfigurationError(f"{', '.join(taken)} in --vllm-args is set by this server; leave it out.")
    options = (
        "--served-model-name", name, "--enable-lora", "--max-lora-rank", str(max_rank),
        "--max-loras", str(max_loras), "--max-cpu-loras", str(max(slots, max_loras)),
        # Forms of answers are followed by the same library as here.
        *(() if any(word.startswith(FORMS) for word in extra) else (FORMS, '{"backend": "guidance"}')), *extra,
    )  # fmt: skip
    return Launch(tuple(own), options, base, positional=python is None)


FORMS = "--structured-outputs-config"
# What --vllm-args may not set: it decides whom we talk to and what a name means.
OURS = {
    "--host", "--port", "--uds", "--api-key", "--model", "--served-model-name", "--enable-lora", "--max-lora-rank",
    "--max-loras", "--max-cpu-loras", "--lora-modules", "--trust-remote-code", "--root-path", "--tokenizer",
    "--ssl-keyfile", "--ssl-certfile",
}  # fmt: skip


class VllmProcess:
    """A running vLLM at `url`, which takes `key`. Close it, or use it as a context manager.

    `on_cpu` is whether it said that it computes on a CPU. `environment` is added to this process's own, of which it does
    not get `PYTHONPATH`: that names modules for our Python.

    Raises:
        ConfigurationError: it ended instead of serving; the text has the last lines it said.
        ResourceError: it did not serve in time.
    """

    def __init__(self, launch: Launch, environment: Mapping[str, str] | None = None) -> None:
        self.key = secrets.token_urlsafe(32)
        self._launch, self._port = launch, _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.restarts = 0
        self.on_cpu = False
        self.on_end: Callable[[], None] = lambda: None
        # The key is no word of the command line, which others on this machine can read.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._environment = {
            **own, **(environment or {}), "VLLM_API_KEY": self.key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }  # fmt: skip
        self._closing = threading.Event()
        self._lines = deque[str](maxlen=LINES)
        self._process = self._start()
        try:
            self._wait(self._process)
        except BaseException:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="adapterhub-vllm-process", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """The id of the process that runs now."""
        return self._process.pid

    def _start(self) -> "subprocess.Popen[str]":
        try:
            # A group of its own: Ctrl+C reaches us alone, and its workers end with it.
            process = subprocess.Popen(
                self._launch.words(self._port), env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ConfigurationError(f"{self._launch.command[0]} cannot be started: {error.strerror}.") from error
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self.on_cpu |= ON_CPU in line
                text = line.rstrip()[:500].replace(self.key, "...")
                self._lines.append(text)
                logger.debug("vLLM: %s", text)

    def _wait(self, process: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx2.Client(base_url=self.url, trust_env=False, timeout=5.0) as client:
            while time.monotonic() < deadline and not self._closing.is_set():
                if process.poll() is not None:
                    time.sleep(0.2)  # for its last words
                    said = "\n".join([line for line in self._lines if line.strip()][-12:])
                    raise ConfigurationError(f"vLLM ended instead of serving (exit code {process.returncode}):\n{said}")
                with contextlib.suppress(httpx2.TransportError):
                    if client.get("/health").status_code == 200:
                        return
                self._closing.wait(0.25)
        raise ResourceError(f"vLLM did not serve within {START_SECONDS:g} s.")

    def _keep(self) -> None:
        failed_at = -FORGIVEN_SECONDS
        while True:
            code = self._process.wait()
            if self._closing.is_set():
                return
            now = time.monotonic()
            recent, failed_at = now - failed_at < FORGIVEN_SECONDS, now
            last = next((line for line in reversed(self._lines) if line.strip()), "")
            if recent:
                logger.critical("vLLM ended again (exit code %s): %s", code, last)
                self.on_end()
                return
            logger.error("vLLM ended (exit code %s): %s; it is started once more.", code, last)
            self._end_group(self._process)
            self.restarts += 1
            try:
                self._process = self._start()
                if self._closing.is_set():
                    self.close()
            except ConfigurationError as error:
                logger.critical("%s", error)
                self.on_end()
                return

    def _end_group(self, process: "subprocess.Popen[str]") -> None:
        """End whatever of its processes is left: its workers have no other parent."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """SIGTERM, then SIGKILL after `STOP_SECONDS`, for it and its workers."""
        self._closing.set()
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        self._end_group(process)
        process.wait()

    def __enter__(self) -> "VllmProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def shown(words: Sequence[str]) -> str:
    """A command line as it would be typed."""
    return shlex.join(words)
