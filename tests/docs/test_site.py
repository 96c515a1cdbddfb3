"""The site: built strictly, with figures that are those of the results."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from adapterhub_lite.cli.main import VERBS, build_app
from adapterhub_lite.serving.api.wire.meanings import MEANINGS
from adapterhub_lite.training.settings import TrainingRecipe
from scripts import diagrams, docs_hooks, picture_sources, reference
from scripts.docs_hooks import PLACE, RESULTS, WRITTEN, FigureError, fill_figures, write_figures
from scripts.reference import PLACE as REFERENCE
from tests.docs.terminal import PAGES, ROOT


def test_a_figure_is_what_the_result_says(tmp_path: Path) -> None:
    (tmp_path / "sums.json").write_text(
        json.dumps(
            {
                "a b": {"c": 0.256, "d / e": {"f": 3}},
                "bytes": 21_400_000,
                "rows": [{"k": "x", "v": 1}, {"k": "y", "v": 2}],
            }
        )
    )
    text = "{{ sums::a b/c::.2f }} {{ sums::a b/c::% }} {{ sums::bytes::MB }} {{ sums::rows/k=y/v }}"
    assert fill_figures(text, tmp_path) == "0.26 26% 21 MB 2"
    assert fill_figures("{{ sums::a b/d / e/f }}", tmp_path) == "3"
    written = write_figures(text, tmp_path)
    assert written.startswith("<!-- sums::a b/c::.2f -->0.26<!-- / --> ")
    assert write_figures(written, tmp_path) == written and fill_figures(written, tmp_path) == "0.26 26% 21 MB 2"
    assert fill_figures(written.replace("0.26", "0.99"), tmp_path) == "0.26 26% 21 MB 2"
    for missing in ("{{ sums::a b/d::.2f }}", "{{ sums::rows/k=z/v }}", "{{ none::a }}"):
        with pytest.raises(FigureError):
            fill_figures(missing, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_figure_of_a_page_is_there(page: Path) -> None:
    text = page.read_text()
    filled = fill_figures(text)
    assert "{{" not in REFERENCE.sub("", filled)
    if PLACE.search(text) or WRITTEN.search(text):
        assert " machine::" in text, "a page with figures says where they come from"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_figure_written_into_a_page_is_that_of_the_result(page: Path) -> None:
    """Red after a bench was run again: `python -m scripts.docs_hooks` writes the new figures."""
    for found in WRITTEN.finditer(page.read_text()):
        assert write_figures(found[0]) == found[0]


def test_every_result_that_is_cited_says_machine_and_command() -> None:
    cited = {match[0] for page in PAGES for form in (PLACE, WRITTEN) for match in form.findall(page.read_text())}
    for name in cited - {"machine"}:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert result["machine"]["cores"] and result["command"] and result["measured"]


def test_the_memory_techniques_have_a_page_each_with_saves_costs_and_use() -> None:
    for page in sorted((ROOT / "docs" / "memory").glob("*.md")):
        text = page.read_text()
        assert "**Saves**" in text or "**Use" in text, page
        assert "**Costs**" in text and re.search(r"\*\*Use", text), page


def test_the_pictures_of_the_concepts_are_those_of_their_script() -> None:
    """Red after a change: `python -m scripts.diagrams` draws them anew."""
    for name, picture in diagrams.PICTURES.items():
        assert (diagrams.IMAGES / f"concept-{name}.svg").read_text() == diagrams.svg(picture)


def test_the_pictures_of_the_app_show_what_it_is_now() -> None:
    """Red after a change of what is drawn: the sentence says how to take the pictures again, or to agree to them."""
    assert picture_sources.stale_pictures() == []


def test_every_picture_of_a_page_is_one_that_a_script_makes_and_looks_after() -> None:
    kept = {f"concept-{name}.svg" for name in diagrams.PICTURES}
    kept |= {name for one in picture_sources.SHOWN for name in picture_sources.pictures_of(one)}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        assert set(re.findall(r"images/([\w.-]+)\)", page.read_text())) <= kept, page


@pytest.mark.parametrize("page", [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")])
def test_links_of_the_first_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("html", "broken"),
    [
        ("<table><tr><td>a | b</td></tr></table><p>either | or</p>", False),
        ("<p>| a | b |\n|---|---|\n| 1 | 2 |</p>", True),
        ("<p>text that ran into it\n| a | b |\n|---|---|</p>", True),
    ],
)
def test_a_broken_table_is_not_published(html: str, broken: bool) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    if broken:
        with pytest.raises(docs_hooks.BrokenPageError, match=r"page\.md has a broken table"):
            docs_hooks.on_page_content(html, page)
    else:
        assert docs_hooks.on_page_content(html, page) == html


def test_a_public_name_without_a_place_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_hooks, "DOCUMENTED", set())
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        of_names = "".join(re.findall(r"^(?:::: .+|\{\{ reference\.names .+)$", page.read_text(), re.MULTILINE))
        docs_hooks.on_page_markdown("\n".join(re.findall(r":::\s[\w.]+|\{\{ reference.names [\w.]+ \}\}", of_names)))
    docs_hooks.on_env(None)
    docs_hooks.DOCUMENTED.discard("adapterhub_lite.memory.plan.plan_memory")
    with pytest.raises(
        docs_hooks.BrokenPageError, match=r"No page documents adapterhub_lite\.memory\.plan\.plan_memory:"
    ):
        docs_hooks.on_env(None)


def test_the_reference_has_every_option_setting_and_error() -> None:
    app = typer.main.get_command(build_app())
    for name, verb in VERBS.items():
        command = app.commands[name]  # type: ignore[attr-defined]
        section = reference.verb_section(name, verb, "")
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts) if "--" in option}
        assert (
            set(re.findall(r"--[a-z][\w-]+", "".join(re.findall(r"^\| (`--[^|]+)\|", section, re.MULTILINE)))) == known
        )
        assert "Example: `adapterhub-lite" in section, name
    table = reference.settings_table("adapterhub_lite.training.settings.TrainingRecipe", "api/settings.md")
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [one.name for one in fields(TrainingRecipe)]
    fields_shown = set(re.findall(r"^\| `(\w+)` \|.+\| [^| ][^|]* \|$", reference.http_api("", ""), re.MULTILINE))
    assert set(MEANINGS) <= fields_shown
    assert reference.errors("", "").count("\n") == 1 + len(list(reference.error_tree())) > 25


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "registry" / "index.html").read_text()
    assert "set_alias" in reference and "AliasConflictError" in reference
    assert (tmp_path / "site" / "figures" / "loss.png").exists()
    assert "how-to/production" in (tmp_path / "site" / "index.html").read_text()
