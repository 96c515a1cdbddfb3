"""Pretend vLLM servers on the tiny base, and our engine before them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.serving.adapters.sources import RegistrySource
from adapterhub_lite.serving.vllm.engine import VllmEngine
from tests.serving.vllm.pretend import PretendVllm


@pytest.fixture(scope="session")
def computing(tiny_base: Path) -> Iterator[InferenceEngine]:
    """What pretend servers compute with: an engine without a registry, for adapters in folders."""
    with InferenceEngine.from_base(tiny_base, device="cpu", max_rows=8) as engine:
        yield engine


@pytest.fixture
def pretend(computing: InferenceEngine) -> Iterator[Callable[..., PretendVllm]]:
    """A function (**options) -> a pretend vLLM, closed after the test."""
    made: list[PretendVllm] = []

    def make(**options: Any) -> PretendVllm:
        made.append(PretendVllm(computing, **options))
        return made[-1]

    yield make
    for one in made:
        one.go_on.set()
        one.close()


@pytest.fixture
def vllm(pretend: Callable[..., PretendVllm]) -> PretendVllm:
    return pretend()


@pytest.fixture
def before(tiny_base: Path, registry: AdapterRegistry) -> Iterator[Callable[..., VllmEngine]]:
    """A function (*servers, **options) -> our engine before them, closed after the test."""
    made: list[VllmEngine] = []

    def make(*servers: PretendVllm, **options: Any) -> VllmEngine:
        base = resolve_base(tiny_base)
        source = RegistrySource(registry, base)
        made.append(VllmEngine(base, [one.url for one in servers], source, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
