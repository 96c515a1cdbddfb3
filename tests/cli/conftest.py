"""The command line as a user meets it, and a registry with something in it."""

import sys
from pathlib import Path

import pytest

from adapterhub_lite.cli.main import main
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from adapterhub_lite.registry import AdapterRegistry
from tests.cli.outcome import Outcome, Run
from tests.fixture_types import MakeAdapter


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The real entry point, in this process: `run("list", "--json")`."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["adapterhub-lite", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture
def stocked(home: Path, make_adapter: MakeAdapter, tiny_base: Path) -> AdapterRegistry:
    from adapterhub_lite.bases import resolve_base

    registry = AdapterRegistry(home)
    for seed in (1, 2):
        registry.add(make_adapter(seed=seed), "sql", base=resolve_base(tiny_base))
    return registry
