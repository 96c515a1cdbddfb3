"""What the pictures of the app in docs/images show, so that one that is older than that is found.

`scripts.pictures` and `scripts.moving_picture` write docs/images/pictures.json: for each tab, and for the film, the digests of the sources
that draw it and of the pictures that were taken. Comments, docstrings and blank lines are no part of a digest. A test and
the build of the site refuse pictures that are older than what they show. After a change that is not to be seen, look at
the pictures and agree to them: `python -m scripts.picture_sources chat plan`.
"""

import ast
import hashlib
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
APP = ROOT / "app" / "adapterhub_app"
RECORD = IMAGES / "pictures.json"
# Of each tab, its pictures are TAB[-dark][-390].png. The film shows the chat.
TABS = ("chat", "train", "runs", "compare", "blend", "registry", "plan")
FILM, FILM_FILE, FILMED = "film", "switch.webp", "chat"
SHOWN = (*TABS, FILM)
# What draws every tab. The page itself is laid out in demo.py.
EVERYWHERE = ("demo.py", "theme.py", "style.css")
# Rooms of the app whose modules draw; the others decide what is drawn.
DRAWING = ("display", "tabs")
DIGITS = 16

Record = dict[str, dict[str, dict[str, str]]]


def pictures_of(tab: str) -> list[str]:
    """The names of the pictures that show a tab, or of the film."""
    if tab == FILM:
        return [FILM_FILE]
    return [f"{tab}{dark}{width}.png" for dark in ("", "-dark") for width in ("", "-390")]


def sources_of(tab: str) -> list[Path]:
    """The files that draw a tab: its module and what it imports of the drawing rooms, and what draws the whole page."""
    first = APP / "tabs" / f"{FILMED if tab == FILM else tab}.py"
    found, waiting = {APP / name for name in EVERYWHERE}, [first]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adapterhub_app."):
                room, *rest = node.module.split(".")[1:]
                if room in DRAWING and rest:
                    waiting.append(APP.joinpath(room, *rest).with_suffix(".py"))
    return sorted(found)


def digest_of(file: Path) -> str:
    """The first hex digits of the sha256 of a file; of Python and styles without what is only said to their readers."""
    content = file.read_bytes()
    if file.suffix == ".py":
        content = without_words(content.decode()).encode()
    if file.suffix == ".css":
        content = b" ".join(re.sub(rb"/\*.*?\*/", b"", content, flags=re.DOTALL).split())
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def without_words(source: str) -> str:
    """Python without docstrings, lines of comment and blank lines. The same on every version of Python."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not lines[token.start[0] - 1][: token.start[1]].strip():
            lines[token.start[0] - 1] = ""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def describe(tab: str, images: Path = IMAGES) -> dict[str, dict[str, str]]:
    """What pictures.json says of a tab whose pictures are as it is now."""
    sources = {path.relative_to(APP).as_posix(): digest_of(path) for path in sources_of(tab)}
    taken = {name: digest_of(images / name) for name in pictures_of(tab) if (images / name).exists()}
    return {"sources": sources, "pictures": taken}


def agree(tabs: list[str], images: Path = IMAGES) -> None:
    """Write down that the pictures of these tabs show what there is now."""
    record = read_record(images)
    record |= {tab: describe(tab, images) for tab in tabs}
    (images / RECORD.name).write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


def read_record(images: Path = IMAGES) -> Record:
    """What was written down; nothing where there is no record."""
    file = images / RECORD.name
    found: Record = json.loads(file.read_text()) if file.exists() else {}
    return found


def stale_pictures(images: Path = IMAGES) -> list[str]:
    """One sentence for each tab whose pictures are older than what they show, or are not those that were taken."""
    record, problems = read_record(images), []
    for tab in SHOWN:
        told, now = record.get(tab, {"sources": {}, "pictures": {}}), describe(tab, images)
        changed = sorted(name for name, _ in told["sources"].items() ^ now["sources"].items())
        swapped = sorted({name for name, _ in told["pictures"].items() ^ now["pictures"].items()})
        if changed:
            files = ", ".join(dict.fromkeys(changed))
            again = "scripts.moving_picture" if tab == FILM else f"scripts.pictures --only {tab}"
            problems.append(
                f"The pictures of {tab} are older than {files}: take them again with `python -m {again}`, or look at them "
                f"and agree with `python -m scripts.picture_sources {tab}`."
            )
        elif swapped:
            problems.append(f"{', '.join(swapped)} is not what was taken of {tab}.")
    return problems


if __name__ == "__main__":
    agree(sys.argv[1:] or list(SHOWN))
