"""What an engine has in memory stays in the store: it can be asked for again after it lost its slot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import RegistryError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import GenerationRequest, InferenceEngine


@pytest.fixture
def registry(home: Path, tiny_base: Path, adapters: dict[str, Path]) -> AdapterRegistry:
    registry = AdapterRegistry(home)
    for folder in ("small", "wide", "mlp"):
        registry.add(adapters[folder], "sql", base=resolve_base(tiny_base))
    return registry


def ask(engine: InferenceEngine, adapter: str) -> None:
    engine.generate(GenerationRequest(prompt="hello", adapter=adapter, max_new_tokens=2))


def collected(registry: AdapterRegistry) -> tuple[str, ...]:
    return registry.plan_gc(keep_newest=0).versions


def test_versions_in_memory_are_kept_until_they_leave_it(
    registry: AdapterRegistry, make_engine: Callable[..., InferenceEngine]
) -> None:
    engine = make_engine(registry=registry)
    assert collected(registry) == ("sql:1", "sql:2", "sql:3")
    ask(engine, "sql:1")
    ask(engine, "sql:2")
    assert collected(registry) == ("sql:3",)
    with pytest.raises(RegistryError, match="held by a running server"):
        registry.remove("sql:1")
    assert registry.gc(keep_newest=0).versions == ("sql:3",)
    ask(engine, "sql:1")
    engine.unload("sql:1")
    ask(engine, "sql:2")
    assert collected(registry) == ("sql:1",)
    engine.close()
    assert collected(registry) == ("sql:1", "sql:2")
    assert not any((registry.home / "leases").iterdir())


def test_many_versions_do_not_pile_up(registry: AdapterRegistry, make_engine: Callable[..., InferenceEngine]) -> None:
    """One slot and one place in host memory: what has left both is nobody's any more."""
    engine = make_engine(registry=registry, max_slots=1, max_host=1)
    for version in (1, 2, 3, 1, 2, 3):
        ask(engine, f"sql:{version}")
    assert len(list((registry.home / "leases").iterdir())) <= 2
