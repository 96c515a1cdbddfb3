"""What MkDocs reads from the project when it builds the site: figures, plots, the reference; and what it refuses to publish.

A page writes `{{ loss::results/frozen/contestants/ours/time_to_full::.2f }}` for a value of
`scripts/bench/results/loss.json`. A step of the path is a key; in a list it chooses, as `preset=full,rank=8`. After the
second `::` stands a format of Python, or `MB` (bytes) or `%` (shares). `{{ machine::loss }}` says when and on what it was measured.

`python -m scripts.docs_hooks` writes the figures into the pages, each behind a comment that says where it is from, so that
they can be read without a site; run it again when a result has changed. The site takes them from the results either way.
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from scripts.diagrams import IMAGES, PICTURES, svg
from scripts.picture_sources import stale_pictures
from scripts.reference import fill_reference, path_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "bench" / "results"
PLACE = re.compile(r"\{\{ (\w+)::([^}]+?)(?:::([^}]+?))? \}\}")
WRITTEN = re.compile(r"<!-- (\w+)::([^>]+?)(?:::([^>:]+?))? -->.*?<!-- / -->")


# Bars that Markdown left as they are.
BARS = re.compile(r"<p>\s*\|[^<]*|<p>[^<]*\|\s*:?-{3}[^<]*")
# What the pages of the site that is being built document, as dotted paths.
DOCUMENTED: set[str] = set()


class BrokenPageError(Exception):
    """A page that would be published broken."""


class FigureError(KeyError):
    """A page names a figure that no result has."""


def on_config(config: Any) -> Any:
    """Replace a folder in the menu, written `how-to/`, by its pages; refuse pictures that are older than what they show.

    Raises:
        BrokenPageError: a picture is.
    """
    DOCUMENTED.clear()
    for name, picture in PICTURES.items():
        if (IMAGES / f"concept-{name}.svg").read_text() != svg(picture):
            raise BrokenPageError(f"concept-{name}.svg is older than what it shows: run `python -m scripts.diagrams`.")
    if stale := stale_pictures():
        raise BrokenPageError("\n".join(stale))
    docs = Path(config["docs_dir"])
    for entry in config["nav"] or []:
        for title, pages in entry.items():
            if isinstance(pages, str) and pages.endswith("/"):
                entry[title] = sorted(path.relative_to(docs).as_posix() for path in (docs / pages).glob("*.md"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the plots of the benches as `figures/NAME.png`."""
    from mkdocs.structure.files import File

    for plot in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Put the figures, and what is written from the code, into a page."""
    filled = fill_figures(fill_reference(markdown, page.file.src_uri if page else ""))
    DOCUMENTED.update(re.findall(r"^::: ([\w.]+)", filled, re.MULTILINE))
    return filled


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Refuse a page with a table that is none: its bars stand in a paragraph.

    Raises:
        BrokenPageError: there is such a paragraph.
    """
    if found := BARS.search(html):
        raise BrokenPageError(f"{page.file.src_uri} has a broken table: {found[0][:120]!r}")
    return html


def on_env(env: Any, **_: Any) -> Any:
    """Refuse a site that leaves out a public name of the package or of one of its rooms.

    Raises:
        BrokenPageError: a name has no place on any page.
    """
    missing = sorted(path for path in public_names() - DOCUMENTED if path.rpartition(".")[0] not in DOCUMENTED)
    if missing:
        raise BrokenPageError(f"No page documents {', '.join(missing)}: add `::: NAME`, or `reference.names`, to one.")
    return env


def public_names() -> set[str]:
    """The dotted path of everything that the package and its rooms offer."""
    import adapterhub_lite

    found = {path_of(adapterhub_lite, name) for name in adapterhub_lite.__all__}
    for init in sorted((ROOT / "adapterhub_lite").glob("*/__init__.py")):
        room = import_module(f"adapterhub_lite.{init.parent.name}")
        found |= {
            path for name in getattr(room, "__all__", ()) if (path := path_of(room, name)).startswith(room.__name__)
        }
    return found


def fill_figures(markdown: str, folder: Path = RESULTS) -> str:
    """Replace every place of `markdown`, written out or not, by the figure it names.

    Raises:
        FigureError: there is no such result, or no such figure in it.
    """

    def filled(match: re.Match[str]) -> str:
        return _figure(folder, *match.groups())

    return PLACE.sub(filled, WRITTEN.sub(filled, markdown))


def write_figures(markdown: str, folder: Path = RESULTS) -> str:
    """As `fill_figures`, with a comment around each figure that says where it is from. Idempotent."""

    def written(match: re.Match[str]) -> str:
        place = "::".join(part for part in match.groups() if part)
        return f"<!-- {place} -->{_figure(folder, *match.groups())}<!-- / -->"

    return PLACE.sub(written, WRITTEN.sub(written, markdown))


def _figure(folder: Path, name: str, path: str, form: str | None) -> str:
    if name == "machine":
        result = _result(folder, path)
        machine = result["machine"]
        processor, gpu = machine["processor"].replace("(R)", ""), machine["gpu"] or "no GPU"
        busy = f"load average {machine['load_average']:.1f} at the end"
        return f"Run of {result['measured'][:10]} on {machine['cores']} cores of {processor}, {gpu}, {busy}; `{result['command']}`"
    value = find_value(_result(folder, name), path, name)
    if form == "MB":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.0%}" if form == "%" else format(value, form or "")


def _result(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    except FileNotFoundError as error:
        raise FigureError(f"There is no result {name!r} in {folder}.") from error
    return found


def find_value(value: Any, path: str, name: str) -> Any:  # Any: JSON
    """Follow the steps of `path` into a result; raises FigureError if one leads nowhere."""
    steps = path.split("/")
    while steps:
        step = steps.pop(0)
        while isinstance(value, dict) and step not in value and steps:
            step += "/" + steps.pop(0)  # a key that has a slash in it
        if isinstance(value, list):
            chosen = dict(part.split("=", 1) for part in step.split(","))
            found = [one for one in value if all(str(one.get(key)) == text for key, text in chosen.items())]
            if len(found) != 1:
                raise FigureError(f"{name}.json has {len(found)} figures of {step!r} in {path!r}, expected one.")
            value = found[0]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            raise FigureError(f"{name}.json has no {step!r} of {path!r}.")
    return value


def main() -> None:
    """Write the figures into README and docs, and say which pages changed."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = page.read_text()
        if (after := write_figures(before)) != before:
            page.write_text(after)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
