"""The registry's tab: what it shows is text, and what an admin does there is told line by line."""

from pathlib import Path

import pytest

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.tabs.catalogue import alias_moves, card_text, catalogue_rows, provenance, version_choices
from adapterhub_app.tabs.registry import promote, pull, push, roll_back
from adapterhub_lite.errors import UsageError
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.app.world import World


def test_rows_hold_every_version_with_its_aliases(world: World) -> None:
    rows = [row for row in catalogue_rows(world.registry) if row[0] == "sql"]
    assert [(row[1], row[2]) for row in rows] == [(2, ""), (1, "prod")]
    assert rows[0][5:8] == [0.02, 0.87, 4]
    assert "sql:1" in version_choices(world.registry)


@pytest.mark.parametrize(
    ("words", "found"), [("sql prod", {"sql"}), ("JSON", {"event"}), ("calendar event", {"event"}), ("zzz", set())]
)
def test_search_wants_every_word_anywhere(world: World, words: str, found: set[str]) -> None:
    assert {row[0] for row in catalogue_rows(world.registry, words)} == found


def test_nothing_of_an_adapter_is_markup(world: World) -> None:
    manifest = world.registry.resolve("odd")
    for text in (provenance(manifest), card_text(manifest).replace("<!-- -->", "")):
        outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
        assert "<script" not in outside_code and "<img" not in outside_code and "![" not in outside_code


def test_promote_and_roll_back_move_the_alias_and_keep_its_history(world: World) -> None:
    backend = world.backend()
    assert promote(backend, None, "sql:1", "beta") == "sql@beta is new and is now at version 1."
    assert "was at version 1" in promote(backend, None, "sql:2", "beta")
    assert roll_back(backend, None, "sql:2", "beta") == "sql@beta is back at version 1."
    moves = [move[1:] for move in alias_moves(world.registry, "sql") if move[1] == "beta"]
    assert moves == [["beta", "rollback", "v2", "v1"], ["beta", "set", "v1", "v2"], ["beta", "set", "none", "v1"]]


def test_what_viewers_may_not_do_is_refused_before_anything_happens(world: World) -> None:
    backend = world.backend(Access(open_role="viewer"))
    for act in (promote, roll_back):
        with pytest.raises(UsageError, match="only an admin may"):
            act(backend, None, "sql:2", "prod")
    assert "only an admin may push" in list(push(backend, None, "sql:1", "me/sql"))[-1][-1]
    assert "only an admin may pull" in list(pull(backend, None, "me/sql", "", ""))[-1][-1]
    assert world.registry.aliases("sql")["prod"] == 1


def test_no_version_or_repository_picked_is_a_sentence(world: World) -> None:
    with pytest.raises(UsageError, match="No version is picked"):
        promote(world.backend(), None, None, "prod")
    assert "repository is missing" in list(push(world.backend(), None, "sql:1", " "))[-1][-1]


def test_push_then_pull_through_a_hub_tells_each_step(world: World, tmp_path: Path, home: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        here = Backend(world.engine, world.registry, "tiny", hub=hub.url)
        lines = list(push(here, None, "event", "me/event"))[-1]
        assert len(lines) > 1 and lines[-1].startswith("Published: me/event v1")
        assert list(push(here, None, "event", "me/event"))[-1][-1].startswith("Already published")
        there = Backend(world.engine, AdapterRegistry(home), "tiny", hub=hub.url)
        pulled = list(pull(there, None, "me/event", "v1", "meeting"))[-1][-1]
        assert pulled.startswith("meeting:1") and "fetched and verified" in pulled
        assert there.registry.resolve("meeting").digest == world.registry.resolve("event").digest
        assert "me/none" in list(pull(there, None, "me/none", "", ""))[-1][-1]
