"""A reader's machine: an empty folder, a home with a base, a terminal."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import run  # noqa: F401
from tests.cli.outcome import Run
from tests.docs.terminal import ROOT, Terminal
from tests.fixture_types import MakeAdapter


@pytest.fixture
def environment(home: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What its commands find set. `smollm2-135m` is the real base where `$ADAPTERHUB_TEST_HOME` has one, else the tiny.

    `vllm` is the pretended one, whatever there is.
    """
    real = os.environ.get("ADAPTERHUB_TEST_HOME")
    source = Path(real) / "bases" / "smollm2-135m" if real else tiny_base
    shutil.copytree(source, home / "bases" / "smollm2-135m")
    found = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    vllm = tmp_path_factory.mktemp("bin") / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/serving/vllm/pretend_process.py "$@"\n')
    vllm.chmod(0o755)
    found["PATH"] = f"{vllm.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    found.pop("HF_ENDPOINT", None)
    return found


@pytest.fixture
def terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    """A terminal that starts a process for each command."""
    opened = Terminal(tmp_path, environment)
    yield opened
    opened.close()


@pytest.fixture
def warm_terminal(
    environment: dict[str, str],
    tmp_path: Path,
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Terminal]:
    """A terminal whose own commands run in this process."""
    monkeypatch.chdir(tmp_path)
    opened = Terminal(tmp_path, environment, run)
    yield opened
    opened.close()


@pytest.fixture
def stocked_home(home: Path, environment: dict[str, str], make_adapter: MakeAdapter) -> Path:
    """The home with `sql` (versions 1 to 4, `prod` at 3), `event`, and a merge `both` of the two."""
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.merging import merge_adapters
    from adapterhub_lite.registry import AdapterRegistry

    registry, base = AdapterRegistry(home), resolve_base("smollm2-135m", home=home)
    for seed, name in enumerate(["sql"] * 4 + ["event"]):
        registry.add(make_adapter(seed=seed), name, base=base)
    registry.set_alias("sql", "prod", version=3)
    merge_adapters(["sql", "event"], name="both", registry=registry)
    return home
