"""A picture of the app is stale when what draws it changes in more than words, or when it is not the one that was taken."""

import json
import shutil
from pathlib import Path

import pytest

from scripts import picture_sources
from scripts.picture_sources import EVERYWHERE, FILM, RECORD, SHOWN, agree, pictures_of, sources_of, stale_pictures
from tests.checkout import ROOT


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the app's package, which the check looks at instead of the real one."""
    copy = shutil.copytree(picture_sources.APP, tmp_path / "adapterhub_app")
    monkeypatch.setattr(picture_sources, "APP", copy)
    return copy


@pytest.fixture
def images(tmp_path: Path, app: Path) -> Path:
    """A folder of pictures that were all taken of the app as it is now."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (name for tab in SHOWN for name in pictures_of(tab)):
        (folder / name).write_bytes(name.encode())
    agree(list(SHOWN), folder)
    assert stale_pictures(folder) == []
    return folder


def add_to(file: Path, text: str) -> None:
    """Write more at the end of a file."""
    file.write_text(file.read_text() + text)


def stale(images: Path) -> list[str]:
    """What is shown by the pictures that are too old, in the order of `SHOWN`."""
    problems = stale_pictures(images)
    return [one for one in SHOWN if any(f" {one} are older" in problem for problem in problems)]


def test_a_changed_tab_makes_its_own_pictures_stale(app: Path, images: Path) -> None:
    add_to(app / "tabs" / "plan.py", "\nMORE = 1\n")
    assert stale(images) == ["plan"]
    (problem,) = stale_pictures(images)
    assert "tabs/plan.py" in problem and "python -m scripts.pictures --only plan" in problem


def test_what_several_tabs_draw_with_makes_all_of_them_stale(app: Path, images: Path) -> None:
    add_to(app / "display" / "transcript.py", "\nMORE = 1\n")
    assert stale(images) == ["chat", FILM]
    add_to(app / "style.css", "\nb { color: red; }\n")
    assert stale(images) == list(SHOWN)


def test_words_for_readers_of_the_code_and_what_draws_nothing_change_no_picture(app: Path, images: Path) -> None:
    add_to(app / "tabs" / "plan.py", "\n\n# A comment on a line of its own.\n")
    plan = app / "tabs" / "plan.py"
    plan.write_text(plan.read_text().replace('"""', '"""In other words. ', 1))
    add_to(app / "style.css", "\n/* A comment. */\n\n")
    add_to(app / "training.py", "\nMORE = 1\n")
    assert stale_pictures(images) == []


def test_a_source_that_goes_or_comes_makes_its_pictures_stale(app: Path, images: Path) -> None:
    record = json.loads((images / RECORD.name).read_text())
    del record["plan"]["sources"]["tabs/plan.py"]
    record["blend"]["sources"]["tabs/gone.py"] = "0" * 16
    (images / RECORD.name).write_text(json.dumps(record))
    assert stale(images) == ["blend", "plan"]


def test_a_picture_that_was_not_taken_is_named(images: Path) -> None:
    (images / "chat-dark.png").write_bytes(b"from elsewhere")
    (images / "plan.png").unlink()
    assert stale_pictures(images) == [
        "chat-dark.png is not what was taken of chat.",
        "plan.png is not what was taken of plan.",
    ]


def test_pictures_without_a_record_are_stale_until_somebody_agrees(app: Path, images: Path) -> None:
    (images / RECORD.name).unlink()
    assert stale(images) == list(SHOWN)
    agree(["chat"], images)
    assert stale(images) == [one for one in SHOWN if one != "chat"]


def test_every_tab_is_drawn_by_files_that_are_there() -> None:
    for one in SHOWN:
        found = sources_of(one)
        assert all(file.is_file() for file in found) and {file.name for file in found} >= set(EVERYWHERE)
    tabs = (ROOT / "app" / "adapterhub_app" / "tabs").glob("*.py")
    drawn = {file for one in SHOWN for file in sources_of(one)}
    assert {file for file in tabs if file.stem not in ("__init__", "first_minute")} <= drawn
