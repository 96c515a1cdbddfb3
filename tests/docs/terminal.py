"""What a reader of the pages types, as they type it."""

import re
import shlex
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.checkout import ROOT
from tests.cli.outcome import Run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a server is asked for when it is ready.
READY = {"serve": "/ready", "hub": "/"}
# Enough to see a command through; a page's own numbers are for a person with a base and a task.
FEWER = {"train": " --steps 2 --batch-size 2 --accumulation 1", "eval": " --limit 2 --max-new-tokens 2"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, without those that say why they aren't run."""
    return [code for skipped, kind, code in FENCE.findall(page.read_text()) if kind == language and not skipped]


def pages_with(language: str) -> list[Path]:
    """The pages that have such blocks."""
    return [page for page in PAGES if blocks(page, language)]


def shortened(line: str) -> str:
    """A command of a page with the fewest steps and answers that still see it through."""
    command = line.partition("  #")[0].strip()
    for verb, fewer in FEWER.items():
        if command.startswith(f"adapterhub-lite {verb} "):
            for option in re.findall(r"--[\w-]+", fewer):
                command = re.sub(rf" {option} \d+", "", command)
            command += fewer
    return command


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Terminal:
    """Each block in bash, in one folder; servers go on in the background until the end, on ports that are free.

    With `run`, commands of ours that are not servers run in this process, where torch is imported already.
    """

    def __init__(self, folder: Path, environment: dict[str, str], run: Run | None = None) -> None:
        self.folder, self.environment, self.run = folder, environment, run
        self.ports: dict[str, str] = {}
        self.servers: list[subprocess.Popen[str]] = []

    def type(self, code: str) -> str:
        """Type a block; returns what was shown. Fails where a command does."""
        code = re.sub(r"(--port |127\.0\.0\.1:)(\d{4})", self._port, code)
        if server := re.search(r"^adapterhub-lite (serve|hub) .*$", code, re.MULTILINE):
            first = code[: server.start()]
            shown = self._bash(first) if first.strip() else ""
            self._start(server[0].partition("#")[0].strip(), READY[server[1]])
            return shown
        if self.run is None:
            return self._bash(code)
        shown = ""
        for line in filter(str.strip, code.replace("\\\n", " ").splitlines()):
            if not line.startswith("adapterhub-lite "):
                shown += self._bash(line)
                continue
            done = self.run(*shlex.split(line, comments=True)[1:])
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            shown += done.stdout + done.stderr
        return shown

    def _port(self, match: "re.Match[str]") -> str:
        return match[1] + self.ports.setdefault(match[2], str(free_port()))

    def _bash(self, code: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=self.folder, env=self.environment, capture_output=True,
            text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def _start(self, command: str, ready: str) -> None:
        port = re.search(r"--port (\d+)", command)
        assert port
        log = self.folder / "server.log"
        with log.open("a") as written:
            server = subprocess.Popen(
                shlex.split(command), cwd=self.folder, env=self.environment, stdout=written, stderr=written, text=True
            )
        self.servers.append(server)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            assert server.poll() is None, log.read_text()
            try:
                urlopen(f"http://127.0.0.1:{port[1]}{ready}", timeout=5).close()
                return
            except HTTPError as error:
                if error.code < 500:
                    return
            except OSError:  # refused, reset, or too busy to answer in time
                pass
            time.sleep(0.2)
        raise AssertionError(f"{command} was not ready.\n{log.read_text()}")

    def close(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(60)
