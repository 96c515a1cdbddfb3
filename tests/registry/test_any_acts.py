"""Whatever is done in whatever order: a plain model of the registry agrees, and a rebuild gives the same database."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import RegistryError, UsageError
from adapterhub_lite.registry import AdapterRegistry

# Few of each, so that acts meet.
VERSIONS, ALIASES = st.integers(1, 4), st.sampled_from(["prod", "prod", "prod", "beta"])
ACT = st.one_of(
    st.tuples(st.just("add")),
    *[st.tuples(st.just("set"), ALIASES, VERSIONS)] * 3,
    *[st.tuples(st.just("back"), ALIASES)] * 3,
    st.tuples(st.just("drop"), ALIASES),
    st.tuples(st.sampled_from(["pin", "unpin", "remove"]), VERSIONS),
    st.tuples(st.just("gc")),
    st.tuples(st.just("rebuild")),
)


class Model:
    """What has to be there, in the plainest terms: a set of versions, and for each alias where it was, newest last."""

    def __init__(self) -> None:
        self.last, self.present, self.pinned = 0, set[int](), set[int]()
        self.aliases: dict[str, int] = {}
        self.moves: dict[str, list[int]] = {"prod": [], "beta": []}

    def do(self, act: str, *rest: Any) -> bool:
        """Do one act; False where it has to be refused."""
        return bool(getattr(self, f"_{act}")(*rest))

    def _add(self) -> bool:
        self.last += 1
        self.present.add(self.last)
        return True

    def _set(self, alias: str, version: int) -> bool:
        if version in self.present and self.aliases.get(alias) != version:
            self.aliases[alias] = version
            self.moves[alias].append(version)
        return version in self.present

    def _back(self, alias: str) -> bool:
        moves = self.moves[alias]
        if alias not in self.aliases:
            return False
        at = max((i for i, v in enumerate(moves[:-1]) if v in self.present and v != self.aliases[alias]), default=None)
        if at is None:
            return False
        # What was gone back over is no longer before anything.
        self.aliases[alias] = moves[at]
        del moves[max(i for i, v in enumerate(moves) if v == moves[at]) + 1 :]
        return True

    def _drop(self, alias: str) -> bool:
        return self.aliases.pop(alias, None) is not None

    def _pin(self, version: int) -> bool:
        if version in self.present:
            self.pinned.add(version)
        return version in self.present

    def _unpin(self, version: int) -> bool:
        self.pinned.discard(version)
        return version in self.present

    def _remove(self, version: int) -> bool:
        free = version in self.present - self.pinned - set(self.aliases.values())
        if free:
            self.present.discard(version)
        return free

    def _gc(self) -> bool:
        newest = {max(self.present)} if self.present else set()
        self.present &= newest | self.pinned | set(self.aliases.values())
        return True

    def _rebuild(self) -> bool:
        return True


def do(registry: AdapterRegistry, adapter: Path, base: ResolvedBase, act: str, *rest: Any) -> bool:
    """The same act on the registry; False where it was refused."""
    acts: dict[str, Any] = {
        "add": lambda: registry.add(adapter, "sql", base=base),
        "set": lambda alias, version: registry.set_alias("sql", alias, version=version),
        "back": lambda alias: registry.rollback("sql", alias),
        "drop": lambda alias: registry.remove_alias("sql", alias),
        "pin": lambda version: registry.pin(f"sql:{version}"),
        "unpin": lambda version: registry.unpin(f"sql:{version}"),
        "remove": lambda version: registry.remove(f"sql:{version}"),
        "gc": registry.gc,
        "rebuild": registry.rebuild,
    }
    with contextlib.suppress(UsageError, RegistryError):
        acts[act](*rest)
        return True
    return False


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(acts=st.lists(ACT, min_size=20, max_size=30))
def test_any_acts(acts: list[Any], adapter: Path, base: ResolvedBase, tmp_path_factory: pytest.TempPathFactory) -> None:
    registry, model = AdapterRegistry(tmp_path_factory.mktemp("home")), Model()
    for act in [*[("add",)] * 4, *acts, ("rebuild",), ("add",)]:
        assert do(registry, adapter, base, *act) == model.do(*act), act
        assert {manifest.version for manifest in registry.list("sql")} == model.present
        assert registry.aliases("sql") == model.aliases
        assert {line.version for line in registry.summaries("sql") if line.pinned} == model.pinned & model.present
    report = registry.examine()
    assert report.problems == ()
    registry.close()
