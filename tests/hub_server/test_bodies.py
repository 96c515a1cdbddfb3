"""`.gitignore` on the hub: as git has it, and never for long."""

import pathspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_lite.hub_server.bodies import ignored_files
from adapterhub_lite.hub_server.store import HubRefusal

PIECES = st.sampled_from(["*", "**", "/", "a", "b", "?", "[ab]", "!", "#", ".", "ab"])
PATHS = ["a", "b", "ab", "a/b", "a/a/b", "b/ab", "ab/a.b", ".a", "#a", "!b"]


@given(st.lists(st.lists(PIECES, max_size=6).map("".join), max_size=4).map("\n".join))
def test_what_is_left_out_is_what_pathspec_says(patterns: str) -> None:
    try:
        spec = pathspec.GitIgnoreSpec.from_lines(patterns.splitlines())
    except ValueError:
        with pytest.raises(HubRefusal, match="cannot be read"):
            ignored_files(patterns, PATHS)
        return
    assert ignored_files(patterns, PATHS) == [path for path in PATHS if spec.match_file(path)]


def test_a_pattern_that_others_never_come_back_from_is_matched() -> None:
    assert ignored_files("*a" * 40 + "*[bc]", ["a" * 250]) == []


def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_lite.hub_server.bodies.MOST_SECONDS", -1.0)
    with pytest.raises(HubRefusal, match="too long"):
        ignored_files("*.pyc", ["a.py"] * 10)
