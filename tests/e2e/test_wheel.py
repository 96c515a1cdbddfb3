"""What is built and installed works without the checkout: the package, and the app as a Hugging Face Space starts it."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from tests.checkout import ROOT
from tests.fixture_types import MakeAdapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("adapterhub_lite-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder in which only what was installed is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    yield tmp_path


def test_package_and_command_line_come_from_the_wheel(installed: Path, elsewhere: Path) -> None:
    code = "import adapterhub_lite, adapterhub_app; print(adapterhub_lite.__file__, adapterhub_app.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(path.startswith(str(installed)) for path in done.stdout.split())
    script = (installed / "bin" / "adapterhub-lite").read_text()
    assert "adapterhub_lite.cli.main" in script
    done = subprocess.run(
        [sys.executable, installed / "bin" / "adapterhub-lite", "list", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]"


def test_a_space_starts_from_its_one_file(
    installed: Path, elsewhere: Path, tiny_base: Path, make_adapter: MakeAdapter, home: Path
) -> None:
    for name in ("README.md", "app.py", "requirements.txt"):
        shutil.copy(ROOT / "app" / name, elsewhere)
    header = re.search(r"^app_file: (\S+)$", (elsewhere / "README.md").read_text(), re.MULTILINE)
    assert header
    AdapterRegistry(home).add(make_adapter(), "sql", base=resolve_base(tiny_base))
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ADAPTERHUB_BASE": str(tiny_base), "GRADIO_SERVER_PORT": str(port)}
    space = subprocess.Popen(
        [sys.executable, header[1]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert space.stdout is not None
        told = ""
        for line in space.stdout:
            told += line
            if "adapterhub-lite is at" in line:
                break
        assert f":{port}/" in told, told
        page = urlopen(f"http://127.0.0.1:{port}/", timeout=30).read().decode()
        assert "sql" in page and "adapterhub-lite" in page
        assert (
            "plan-bar" in page
            or "plan-bar" in urlopen(f"http://127.0.0.1:{port}/theme.css", timeout=30).read().decode()
        )
    finally:
        space.kill()
        space.communicate()
