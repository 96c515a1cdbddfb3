"""Lists are filtered by name, base, task, tag and metric; a line and a manifest say the same."""

from pathlib import Path

import pytest

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry import AdapterRegistry


@pytest.fixture
def filled(registry: AdapterRegistry, adapter: Path, other_adapter: Path, base: ResolvedBase) -> AdapterRegistry:
    def measured(value: float) -> list[dict[str, object]]:
        return [{"metric": "exact_match", "adapter_value": value, "base_value": 0.1, "data": "sql-test"}]

    registry.add(adapter, "sql", base=base, task="sql", tags=("fast", "old"), evaluation=measured(0.5))
    registry.add(other_adapter, "sql", base=base, task="sql", tags=("fast",), evaluation=measured(0.9))
    registry.add(adapter, "event", base=base, task="event")
    registry.set_alias("sql", "prod", version=2)
    registry.set_alias("sql", "best", version=2)
    return registry


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["event:1", "sql:1", "sql:2"]),
        ({"name": "sql"}, ["sql:1", "sql:2"]),
        ({"task": "event"}, ["event:1"]),
        ({"tag": "fast"}, ["sql:1", "sql:2"]),
        ({"tag": "old", "name": "event"}, []),
        ({"metric": "exact_match"}, ["sql:1", "sql:2"]),
        ({"metric": "exact_match >= 0.9"}, ["sql:2"]),
        ({"metric": "exact_match<0.9"}, ["sql:1"]),
        ({"metric": "bleu"}, []),
        ({"base": "nobody/nothing"}, []),
        ({"name": "sql' OR '1'='1"}, []),
    ],
)
def test_filters(filled: AdapterRegistry, filters: dict[str, str], expected: list[str]) -> None:
    assert [m.reference for m in filled.list(**filters)] == expected
    assert [f"{line.name}:{line.version}" for line in filled.summaries(**filters)] == expected


def test_a_base_is_found_by_id_and_by_fingerprint(filled: AdapterRegistry, base: ResolvedBase) -> None:
    assert len(filled.summaries(base=base.model_id)) == len(filled.summaries(base=base.fingerprint[:12])) == 3
    assert filled.summaries(base=base.fingerprint[:3]) == []


def test_a_line_says_what_the_manifest_says(filled: AdapterRegistry) -> None:
    line, manifest = filled.summaries("sql")[1], filled.resolve("sql:2")
    assert (line.digest, line.task, line.created, line.tags) == (
        manifest.digest, manifest.task, manifest.created, manifest.tags,
    )  # fmt: skip
    assert line.aliases == ("best", "prod")
    assert line.metrics == {"exact_match": (0.9, 0.1)}
    assert line.size == sum(record.size for record in manifest.files.values())
    details = filled.show("sql@prod")
    assert (details.manifest, details.aliases, details.size) == (manifest, line.aliases, line.size)
    assert not (details.pinned or details.signed or details.held)


@pytest.mark.parametrize("metric", ["", ">=0.5", "exact_match>=x", "exact_match; DROP TABLE versions"])
def test_a_metric_that_is_none_is_refused(filled: AdapterRegistry, metric: str) -> None:
    with pytest.raises(UsageError, match="Wanted a metric"):
        filled.summaries(metric=metric)
