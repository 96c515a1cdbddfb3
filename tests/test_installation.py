"""Install by need: the core keeps, signs, pushes and pulls without torch and without what only Linux has."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from adapterhub_lite import installation
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from tests.checkout import ROOT
from tests.fixture_types import MakeAdapter

# Run in a process of its own: everything that comes with an extra, and everything that only Linux has, is not there.
BARE = """
import builtins, ctypes, io, os, sys
from adapterhub_lite.installation import _closure, _extras

extras = _extras()
HIDDEN = {name for extra in extras for name in _closure(extra, extras)} | {"fcntl", "resource"}
sys.modules.update(dict.fromkeys(HIDDEN))
assert {"torch", "gradio", "fastapi", "numpy", "uvloop"} <= HIDDEN

def guarded(call):
    def checked(path, *rest, **given):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "hidden", str(path))
        return call(path, *rest, **given)
    return checked

io.open, builtins.open, os.stat = guarded(io.open), guarded(builtins.open), guarded(os.stat)
for name in ("fork", "O_NOFOLLOW", "O_NONBLOCK", "sysconf", "register_at_fork"):
    delattr(os, name)
ctypes.CDLL = None
"""
KEEP = """
import threading
from pathlib import Path
from adapterhub_lite import AdapterRegistry
from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry.operations.sign import generate_key

folder, base, hub, home = sys.argv[1:]
registry = AdapterRegistry(home)
base = resolve_base(base)
first = registry.add(folder, "sql", base=base)
registry.set_alias("sql", "prod", version=1)
generate_key(registry.store.home, "default")
registry.sign("sql:1")
registry.verify("sql:1")
registry.push("sql@prod", "team/sql-lora", endpoint=hub)
pulled = registry.pull("team/sql-lora", name="theirs", endpoint=hub)
assert registry.resolve("theirs").digest == first.digest
with registry.hold("theirs"):
    try:
        registry.remove("theirs:1")
    except RegistryError:
        print("held")
assert registry.diff("sql", "theirs", layers=False).same_base
registry.export("sql", Path(home) / "plain")
registry.remove("theirs:1")
registry.gc()
assert registry.examine().healthy and registry.rebuild().versions == 1
writers = [threading.Thread(target=registry.set_alias, args=("sql", f"a{n}"), kwargs={"version": 1}) for n in range(8)]
[one.start() for one in writers]
[one.join() for one in writers]
assert len(registry.aliases("sql")) == 9
"""


def bare(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'app'}", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE + code, *arguments], capture_output=True, text=True, env=environment
    )


def test_the_registry_needs_nothing_of_an_extra_nor_of_linux(
    make_adapter: MakeAdapter,
    tiny_base: Path,
    hub_server: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    done = bare(KEEP, str(make_adapter()), str(tiny_base), hub_server.url, str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train sql --task sql", "train"),
        ("plan smollm2-135m", "train"),
        ("serve", "serve"),
        ("hub", "serve"),
        ("demo", "app"),
    ],
)
def test_a_verb_whose_extra_is_missing_says_what_to_type(command: str, extra: str, tmp_path: Path) -> None:
    code = "from adapterhub_lite.cli.main import main\nsys.argv[0] = 'adapterhub-lite'\nmain()"
    done = bare(code, *command.split(), *(() if command == "hub" or "plan" in command else ("--home", str(tmp_path))))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"-m pip install -e '{ROOT}[{extra}]'" in done.stderr


def test_an_import_whose_extra_is_missing_says_what_to_type() -> None:
    code = """
try:
    from adapterhub_lite import AdapterTrainer
except ImportError as error:
    print(error)
import adapterhub_lite.cli.main, adapterhub_lite.diagnosis
print(*[finding.remedy for finding in adapterhub_lite.diagnosis.diagnose()])
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{ROOT}[train]") == 2 and "AdapterTrainer needs packages" in done.stdout


def test_the_core_weighs_under_100_mb() -> None:
    """With all that it brings along, as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, size, seen = list(project["dependencies"]), 0, set()
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.name.lower() in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(wanted.name.lower())
        found = distribution(wanted.name)
        size += sum(path.stat().st_size for file in found.files or () if (path := Path(str(file.locate()))).is_file())
        waiting += found.requires or []
    assert size < 100e6 and not seen & {"torch", "numpy", "transformers", "fastapi", "gradio"}, (size, seen)


class Dist:
    """What pip or uv wrote of an installation."""

    def __init__(self, tool: str, source: str | None) -> None:
        self.files = {"INSTALLER": tool, "direct_url.json": source}
        self.requires: list[str] = []

    def read_text(self, name: str) -> str | None:
        return self.files[name]


@pytest.mark.parametrize(
    ("tool", "source", "command"),
    [
        ("pip", None, "-m pip install 'adapterhub-lite[serve]'"),
        ("uv", None, "uv pip install --python {python} 'adapterhub-lite[serve]'"),
        ("pip", '{"url": "file:///", "dir_info": {}}', "-m pip install '/[serve]'"),
        (
            "pip",
            '{"url": "https://x/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
            "-m pip install 'adapterhub-lite[serve] @ git+https://x/r.git@abc'",
        ),
        ("pip", '{"url": "file:///a/b.whl", "archive_info": {}}', "'adapterhub-lite[serve] @ file:///a/b.whl'"),
    ],
)
def test_the_command_is_that_of_the_installation(
    tool: str, source: str | None, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "_installed", lambda: Dist(tool, source))
    assert command.format(python=sys.executable) in installation.install_command("serve")
