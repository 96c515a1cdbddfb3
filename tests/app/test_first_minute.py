"""The cards, the commands of the message box, and what an empty registry offers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_app.access import Access
from adapterhub_app.backend import Backend
from adapterhub_app.display.colours import COLOURS, colour_of, task_colours
from adapterhub_app.display.escape import in_template
from adapterhub_app.display.task import BASE
from adapterhub_app.display.transcript import Turn
from adapterhub_app.tabs.chat import command_in, last_two
from adapterhub_app.tabs.first_minute import example_words, is_empty
from adapterhub_app.tabs.task_cards import draw_cards
from adapterhub_app.tabs.train import name_from
from adapterhub_app.training import (
    Source,
    add_folder,
    keep_adapter,
    look_at,
    name_in,
    options_of,
    preset_choices,
    recipe_of,
    start_run,
)
from adapterhub_lite.adapter_format.manifest import name_problem
from adapterhub_lite.errors import ConfigurationError, ReferenceSyntaxError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.runs.folder import list_runs
from adapterhub_lite.runs.state import RunState, now, write_state
from adapterhub_lite.training.settings import TrainingRecipe
from tests.app.world import World


@pytest.mark.parametrize(
    ("text", "task", "question"),
    [
        ("/sql@prod Films?", "sql@prod", "Films?"),
        ("  /base   two\nlines ", BASE, "two\nlines"),
        ("/sql:2", "sql:2", ""),
        ("/sql*0.5+event*0.5 both", "sql*0.5+event*0.5", "both"),
        ("/etc/passwd is what?", "event", "/etc/passwd is what?"),
        ("/ no", "event", "/ no"),
        ("what is /sql", "event", "what is /sql"),
    ],
)
def test_a_command_switches_and_anything_else_is_a_question(text: str, task: str, question: str) -> None:
    assert command_in(text, "event") == (task, question)


def test_side_by_side_takes_who_answered_and_who_is_picked() -> None:
    turns = [Turn(role="user", text="q"), Turn(role="assistant", text="a", by="sql@prod", notice="x")]
    assert last_two(turns, "event") == ("q", ["sql@prod", "event"])
    assert last_two(turns, BASE) == ("q", ["sql@prod"])
    assert last_two([], BASE) == ("", [])


def test_all_versions_of_an_adapter_have_one_colour() -> None:
    for colours in ({}, {"sql": 3}):
        assert len({colour_of(name, colours) for name in ("sql", "sql:2", "sql@prod", "0.5×sql + 0.5×event")}) == 1
    assert colour_of("base", {}) == colour_of(BASE, {}) == "task-base"


@given(st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), unique=True, max_size=12), st.data())
def test_tasks_on_the_cards_have_different_colours_that_stay(names: list[str], data: Any) -> None:
    """`sql` and `event` would both get colour 2. What is added later, a version too, changes no colour on the cards."""
    names = ["event", "sql", *(name for name in names if name not in ("event", "sql"))]
    manifests = [added(name, 1, second) for second, name in enumerate(data.draw(st.permutations(names)))]
    colours = task_colours(manifests)
    listed = sorted(names)[:COLOURS]
    assert sorted(colours) == listed and len(set(colours.values())) == len(listed)
    assert set(colours.values()) <= set(range(COLOURS))
    assert task_colours([added(names[0], 2, 50), *manifests]) == colours
    if len(names) < COLOURS:
        assert {**task_colours([added("aa-new", 1, 50), *manifests]), **colours} == task_colours(
            [*manifests, added("aa-new", 1, 50)]
        )


def added(name: str, version: int, second: int) -> Any:
    """What `task_colours` reads of a manifest."""
    return SimpleNamespace(name=name, version=version, created=f"2026-01-01T00:00:{second:02}Z")


def test_cards_are_the_base_and_the_newest_versions_and_hostile_texts_stay_text(world: World) -> None:
    page = draw_cards(world.backend(), "sql")
    assert page.count("<button") == 4 and page.count('aria-pressed="true"') == 1
    assert "<script>" not in page and "<img" not in page and "version 2 · exact match 0.87" in page
    assert in_template("${1} {{x}}") == "&#36;&#123;1&#125; &#123;&#123;x&#125;&#125;"


def test_an_empty_registry_is_seen_and_the_example_says_how_long_it_took(world: World, tmp_path: Path) -> None:
    backend = Backend(world.engine, AdapterRegistry(tmp_path), "tiny", base=world.base)
    assert is_empty(backend) and not is_empty(world.backend())
    assert example_words(backend) == "Train the SQL example: 30 steps"
    took = RunState(
        name="sql", stage="finished", created="2026-01-01T00:00:00+00:00", changed="2026-01-01T00:01:20+00:00",
        data="adapterhub-lite/tasks/sql",
    )  # fmt: skip
    write_state(tmp_path / "runs" / "sql" / "k", took)
    assert example_words(backend) == "Train the SQL example: 30 steps, 80 s the last time"


def test_an_added_folder_is_called_as_it_was_kept_or_as_one_says(world: World, tmp_path: Path) -> None:
    from adapterhub_lite.adapter_format.manifest import MANIFEST_FILE

    kept = [str(file) for file in world.registry.export("event", tmp_path / "kept").iterdir()]
    assert name_in(kept) == "event" and name_in([one for one in kept if MANIFEST_FILE not in one]) == ""
    (tmp_path / MANIFEST_FILE).write_text("{}")
    assert name_in([str(tmp_path / MANIFEST_FILE)]) == ""
    with pytest.raises(ReferenceSyntaxError, match="a name of 1 to 64"):
        add_folder(world.backend(), None, kept, "")


def test_settings_go_to_the_command_line_and_back_unchanged() -> None:
    recipe = recipe_of({"steps": 7, "epochs": 2, "learning_rate": 1, "validation_split": 0.25, "overlong": "drop"})
    words = options_of(recipe)
    given = dict(zip((word[2:].replace("-", "_") for word in words[::2]), words[1::2], strict=True))
    kinds = {name: type(getattr(recipe, name)) for name in given}
    assert TrainingRecipe(**{name: kinds[name](value) for name, value in given.items()}) == recipe
    assert isinstance(recipe.epochs, float)
    with pytest.raises(UsageError, match="A number is missing: rank"):
        recipe_of({"rank": None})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/tmp/Straßen (neu).csv", "strassen-neu"),
        ("/tmp/Kundenfragen März.jsonl", "kundenfragen-marz"),
        ("/tmp/ﬁn.CSV", "fin"),
        ("/tmp/日本.csv", "task"),
        (f"/tmp/{'a' * 39}-b.csv", "a" * 39),
    ],
)
def test_a_task_is_called_after_its_file_in_letters_that_a_name_may_have(file: str, name: str) -> None:
    assert name_from(Source(file=file)) == name
    assert name_problem(name) is None


def test_only_admins_train_and_add_and_names_are_checked(world: World, tmp_path: Path) -> None:
    viewer, admin = world.backend(Access(open_role="viewer")), world.backend()
    look = look_at(admin, Source(task="sql"), TrainingRecipe())
    with pytest.raises(UsageError, match="only an admin may train"):
        start_run(viewer, None, "x", look, TrainingRecipe(steps=1))
    with pytest.raises(ReferenceSyntaxError):
        start_run(admin, None, "not a name/", look, TrainingRecipe(steps=1))
    with pytest.raises(ConfigurationError, match="zero1"):
        start_run(admin, None, "x", look, TrainingRecipe(steps=1, memory_preset="zero1"))
    assert "zero1" not in dict(preset_choices()).values() and "auto" in dict(preset_choices()).values()
    assert list_runs(world.home) == []
    with pytest.raises(UsageError, match="only an admin may add"):
        add_folder(viewer, None, [], "x")
    with pytest.raises(UsageError, match="the folder that holds"):
        add_folder(admin, None, [], "x")
    write_state(world.home / "runs" / "x" / "k", RunState(name="x", stage="stopped", created=now(), changed=now()))
    with pytest.raises(UsageError, match="Nothing of this run is saved"):
        keep_adapter(admin, None, list_runs(world.home)[0], "x", "")
