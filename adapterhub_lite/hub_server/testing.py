"""A pytest fixture: import `hub_server` in a conftest.py for a fresh hub in each test, with faults to inject."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_lite.hub_server.server import HubServer


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator[HubServer]:
    """A hub that everybody may write to, on a free port, with empty data; `hub_server.faults.add(...)` injects faults."""
    with HubServer(tmp_path / "hub-data") as server:
        yield server
