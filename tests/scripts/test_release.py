"""What a release says of itself, and when there is none."""

from pathlib import Path

import pytest

from scripts.release import ReleaseError, current_version, notes
from tests.checkout import ROOT

CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n- new\n\n## [0.2.0] - 2026-12-01\n\n- two\n\n### More\n\n- three\n\n"
    + "## [0.1.0] - 2026-01-01\n"
)


def test_the_notes_are_the_section_of_the_version() -> None:
    assert notes(CHANGELOG, "0.2.0", final=True) == "- two\n\n### More\n\n- three\n"
    assert notes(CHANGELOG, "0.3.0", final=False) == "- new\n"
    for version in ("0.3.0", "0.1.0", "0.2"):
        with pytest.raises(ReleaseError, match="no section"):
            notes(CHANGELOG, version, final=True)


def test_the_version_is_one(tmp_path: Path) -> None:
    assert notes((ROOT / "CHANGELOG.md").read_text(), current_version(), final=False)
    (tmp_path / "adapterhub_lite").mkdir()
    (tmp_path / "adapterhub_lite" / "__init__.py").write_text('__version__ = "1.0"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.1\n")
    with pytest.raises(ReleaseError, match="same version"):
        current_version(tmp_path)
