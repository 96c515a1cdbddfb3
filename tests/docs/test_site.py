"""The site: built strictly, with figures that are those of the results, and code that runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.docs_hooks import PLACE, RESULTS, FigureError, fill_figures

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a server is asked for when it is ready.
READY = {"serve": "/ready", "hub": "/"}


def blocks(page: Path, language: str) -> list[str]:
    return [code for skipped, kind, code in FENCE.findall(page.read_text()) if kind == language and not skipped]


def with_python() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python")]


def test_a_figure_is_what_the_result_says(tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(
        json.dumps({"a b": {"c": 0.256}, "bytes": 21_400_000, "rows": [{"k": "x", "v": 1}, {"k": "y", "v": 2}]})
    )
    text = "{{ sums::a b/c::.2f }} {{ sums::a b/c::% }} {{ sums::bytes::MB }} {{ sums::rows/k=y/v }}"
    assert fill_figures(text, tmp_path) == "0.26 26% 21 MB 2"
    for missing in ("{{ sums::a b/d::.2f }}", "{{ sums::rows/k=z/v }}", "{{ none::a }}"):
        with pytest.raises(FigureError):
            fill_figures(missing, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_figure_of_a_page_is_there(page: Path) -> None:
    text = page.read_text()
    filled = fill_figures(text)
    assert "{{" not in filled.replace("{{ verbs }}", "")
    if PLACE.search(text):
        assert "{{ machine::" in text, "a page with figures says where they come from"


def test_every_result_that_is_cited_says_machine_and_command() -> None:
    for name in {match[0] for page in PAGES for match in PLACE.findall(page.read_text())} - {"machine"}:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert result["machine"]["cores"] and result["command"] and result["measured"]


def test_the_memory_techniques_have_a_page_each_with_saves_costs_and_use() -> None:
    for page in sorted((ROOT / "docs" / "memory").glob("*.md")):
        text = page.read_text()
        assert "**Saves**" in text or "**Use" in text, page
        assert "**Costs**" in text and re.search(r"\*\*Use", text), page


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "registry" / "index.html").read_text()
    assert "set_alias" in reference and "AliasConflictError" in reference
    assert (tmp_path / "site" / "figures" / "loss.png").exists()
    assert "how-to/production" in (tmp_path / "site" / "index.html").read_text()


@pytest.fixture
def prepared(home: Path, tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a home in which `smollm2-135m` is the tiny base, with a merge `both` of two adapters."""
    from adapterhub_lite.merging import merge_adapters
    from adapterhub_lite.registry import AdapterRegistry

    shutil.copytree(tiny_base, home / "bases" / "smollm2-135m")
    registry = AdapterRegistry(home)
    from adapterhub_lite.bases import resolve_base

    for seed, name in enumerate(("sql", "event")):
        registry.add(make_adapter(seed=seed), name, base=resolve_base("smollm2-135m", home=home))
    merge_adapters(["sql", "event"], name="both", registry=registry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.soak
@pytest.mark.parametrize("page", with_python(), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, prepared: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Terminal:
    """What a reader types: each block in bash, in one folder; servers go on in the background until the end."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.ports: dict[str, str] = {}
        self.servers: list[subprocess.Popen[str]] = []

    def type(self, code: str) -> str:
        code = re.sub(r"(--port |127\.0\.0\.1:)(\d{4})", self._port, code)
        if server := re.search(r"^adapterhub-lite (serve|hub) .*$", code, re.MULTILINE):
            first = code[: server.start()]
            shown = self._run(first) if first.strip() else ""
            self._start(server[0].partition("#")[0].strip(), READY[server[1]])
            return shown
        return self._run(code)

    def _port(self, match: "re.Match[str]") -> str:
        return match[1] + self.ports.setdefault(match[2], str(free_port()))

    def _run(self, code: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], cwd=self.folder, env=self.environment, capture_output=True,
            text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def _start(self, command: str, ready: str) -> None:
        from urllib.error import HTTPError, URLError
        from urllib.request import urlopen

        port = re.search(r"--port (\d+)", command)
        assert port
        log = (self.folder / "server.log").open("a")
        server = subprocess.Popen(
            command.split(), cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True
        )
        self.servers.append(server)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            assert server.poll() is None, (self.folder / "server.log").read_text()
            try:
                urlopen(f"http://127.0.0.1:{port[1]}{ready}", timeout=5)
                return
            except HTTPError as error:
                if error.code < 500:
                    return
            except URLError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"{command} was not ready.\n{(self.folder / 'server.log').read_text()}")

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(60)


@pytest.fixture
def terminal(home: Path, tiny_base: Path, tmp_path: Path) -> Any:
    """A terminal; with a real base where `$ADAPTERHUB_TEST_HOME` has one, else `smollm2-135m` is the tiny base."""
    real = os.environ.get("ADAPTERHUB_TEST_HOME")
    source = Path(real) / "bases" / "smollm2-135m" if real else tiny_base
    shutil.copytree(source, home / "bases" / "smollm2-135m")
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_ENDPOINT", None)
    opened = Terminal(tmp_path, environment)
    yield opened
    opened.close()


@pytest.mark.soak
def test_the_tutorial_runs_as_it_is_written(terminal: Terminal) -> None:
    """From one's own rows to a task that is served and shared, with the commands of the page and nothing else."""
    shown = [terminal.type(code) for code in blocks(ROOT / "docs" / "tutorial.md", "bash")]
    answer = next(text for text in shown if '"receipt"' in text)
    assert json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["receipt"]["adapter"] == "desk:1"
    assert any("desk-again:1" in text for text in shown)
    assert "desk@prod points to version 1 again" in shown[-1]
    if os.environ.get("ADAPTERHUB_TEST_HOME"):
        assert '"content":"billing"' in answer.replace(" ", "")


# Read once, then built by the quickstart's own test; the app and the servers have theirs.
NOT_HERE = ("bash scripts/", "adapterhub-lite serve", "adapterhub-lite demo")


@pytest.mark.soak
def test_the_commands_of_the_readme_run(terminal: Terminal) -> None:
    """Line by line, with fewer steps: two adapters first, as `merge` and `diff` want them."""
    lines = [line for code in blocks(ROOT / "README.md", "bash") for line in code.splitlines()]
    lines = [line for line in lines if line.startswith("adapterhub-lite ") and not line.startswith(NOT_HERE)]
    assert len(lines) > 8
    short = " --steps 2 --batch-size 2"
    for made in ("sql --task sql --seed 1", "event --task event"):
        terminal.type(f"adapterhub-lite train {made}{short}")
    hub = next(line for line in lines if line.startswith("adapterhub-lite hub"))
    terminal.type(hub)
    for line in lines:
        command = line.partition("#")[0].strip()
        if command.startswith("adapterhub-lite train"):
            command = re.sub(r" --steps \d+", short, command)
        if command.startswith("adapterhub-lite eval"):
            command += " --limit 2 --max-new-tokens 2"
        if line != hub:
            terminal.type(command)
