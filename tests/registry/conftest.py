"""What the registry's tests share: a registry in the test's home, the tiny base, adapters added to it."""

from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from adapterhub_lite.registry import AdapterRegistry


@pytest.fixture
def registry(home: Path) -> AdapterRegistry:
    return AdapterRegistry(home)


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> ResolvedBase:
    return resolve_base(tiny_base)


@pytest.fixture(scope="session")
def adapter(make_adapter: Any) -> Path:
    """One sound adapter folder. Copy it before you change it."""
    return make_adapter(seed=1)


@pytest.fixture(scope="session")
def other_adapter(make_adapter: Any) -> Path:
    return make_adapter(seed=2)
