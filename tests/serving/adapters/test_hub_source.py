"""Adapters pulled from a hub at their first use, and what happens when the hub is down: warm, cold, again and again."""

from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import HubError, HubUnreachableError, UsageError
from adapterhub_lite.hub_server.testing import hub_server  # noqa: F401
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import push_alias
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.hub_source import HubSource
from adapterhub_lite.serving.model.runner import ModelRunner

REPO = "org/sql-lora"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hub(hub_server: Any, tmp_path: Path, tiny_base: Path, adapters: dict[str, Path]) -> Any:  # noqa: F811
    """A hub with version 1 of sql, and @prod pointing to it."""
    author = AdapterRegistry(tmp_path / "author")
    author.add(adapters["small"], "sql", base=resolve_base(tiny_base))
    author.push("sql:1", REPO, endpoint=hub_server.url)
    push_alias(REPO, "prod", 1, endpoint=hub_server.url)
    return hub_server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(home: Path) -> AdapterRegistry:
    return AdapterRegistry(home)


@pytest.fixture
def source(hub: Any, registry: AdapterRegistry, clock: Clock, tiny_base: Path) -> HubSource:
    return HubSource(registry, ["org/*"], clock=clock, endpoint=hub.url)


def ask_hub_for(source: HubSource, reference: str) -> str:
    return source.locate(reference).name


def test_first_use_pulls_and_later_uses_do_not_ask(
    hub: Any, source: HubSource, tiny_base: Path, alone: Any, adapters: dict[str, Path], byte_tokenizer: Any
) -> None:
    from adapterhub_lite.bases import base_fingerprint, load_base_model

    runner = ModelRunner(load_base_model(tiny_base), rows=2)
    with InferenceEngine(runner, byte_tokenizer, base_fingerprint(tiny_base), source=source) as engine:
        request = GenerationRequest(prompt="pulled", adapter=f"{REPO}:1", max_new_tokens=6)
        assert engine.generate(request).token_ids == alone.tokens("pulled", adapters["small"], new=6)
        asked = len(hub.faults.log)
        hub.faults.add("503", times=1000)
        assert engine.generate(request).adapter == "sql-lora:1"
        assert len(hub.faults.log) == asked
        assert engine.status().can_pull is True


def test_warm_cache_serves_while_the_hub_is_down(hub: Any, source: HubSource, clock: Clock) -> None:
    assert ask_hub_for(source, f"{REPO}@prod") == "sql-lora:1"
    hub.faults.add("503", times=10_000)
    clock.now = 61.0
    assert ask_hub_for(source, f"{REPO}@prod") == "sql-lora:1"
    assert source.trouble is not None
    hub.faults.clear()
    clock.now = 200.0
    assert ask_hub_for(source, f"{REPO}@prod") == "sql-lora:1"
    assert source.trouble is None


def test_another_process_pulled_it_before(hub: Any, source: HubSource, registry: AdapterRegistry) -> None:
    ask_hub_for(source, f"{REPO}:1")
    hub.faults.add("503", times=10_000)
    fresh = HubSource(registry, ["org/*"], endpoint=hub.url)
    assert ask_hub_for(fresh, f"{REPO}:1") == "sql-lora:1"
    assert fresh.trouble is not None


def test_cold_miss_fails_once_slowly_and_then_at_once(hub: Any, source: HubSource, clock: Clock) -> None:
    hub.faults.add("503", times=10_000)
    with pytest.raises(HubUnreachableError):
        ask_hub_for(source, f"{REPO}:1")
    asked = len(hub.faults.log)
    for _ in range(100):
        with pytest.raises(HubUnreachableError):
            ask_hub_for(source, f"{REPO}:1")
    assert len(hub.faults.log) == asked, "a failed miss is not asked for again while it is fresh"
    hub.faults.clear()
    clock.now = 31.0
    assert ask_hub_for(source, f"{REPO}:1") == "sql-lora:1"


def test_what_is_not_there_or_not_allowed(source: HubSource) -> None:
    with pytest.raises(HubError):
        ask_hub_for(source, "org/nothing")
    with pytest.raises(UsageError, match="does not pull 'evil/sql'"):
        ask_hub_for(source, "evil/sql")


def test_local_names_never_ask_the_hub(hub: Any, source: HubSource, adapters: dict[str, Path], tiny_base: Path) -> None:
    asked = len(hub.faults.log)
    assert source.locate(adapters["wide"]).digest.startswith("sha256:")
    assert len(hub.faults.log) == asked
