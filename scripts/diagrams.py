"""Draws the pictures of docs/concepts.md: `python -m scripts.diagrams` writes docs/images/concept-*.svg.

A picture is boxes on a grid and arrows between them, so that it changes in a diff as its words do.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLUMN, ROW, WIDTH, HEIGHT, MARGIN = 272, 84, 196, 54, 16
INK, LINE, PLAIN, STRONG, GREEN = "#0f172a", "#64748b", "#f1f5f9", "#bae6fd", "#bbf7d0"


@dataclass(frozen=True)
class Box:
    """Words at a place of the grid (columns and rows from 0); a second line is in small letters."""

    name: str
    column: float
    row: float
    text: str
    small: str = ""
    fill: str = PLAIN


@dataclass(frozen=True)
class Picture:
    """Boxes, and arrows as (from, to, words): to the right, or `down`."""

    boxes: tuple[Box, ...]
    arrows: tuple[tuple[str, str, str], ...]
    down: bool = False


PICTURES: dict[str, Picture] = {
    "base": Picture(
        (
            Box("name", 0, 0, "smollm2-135m", "a name, a folder, a Hub id"),
            Box("folder", 1, 0, "a folder", "weights, tokenizer, template"),
            Box("print", 2, 0, "fingerprint", "sha256 over all of it", STRONG),
        ),
        (("name", "folder", "fetched once"), ("folder", "print", "")),
    ),
    "adapter": Picture(
        (
            Box("input", 0, 0.5, "what comes in", "x"),
            Box("weight", 1, 0, "base's weight W", "frozen, shared by all"),
            Box("pair", 1, 1, "A, then B", "rank 8: what is trained", STRONG),
            Box("sum", 2, 0.5, "W x + s B A x", "s = alpha / rank"),
        ),
        (("input", "weight", ""), ("input", "pair", ""), ("weight", "sum", ""), ("pair", "sum", "")),
    ),
    "version": Picture(
        (
            Box("one", 0, 0, "sql:1", "never changes"),
            Box("two", 1, 0, "sql:2", "never changes"),
            Box("three", 2, 0, "sql:3", "never changes", STRONG),
            Box("content", 1, 1, "contents by sha256", "shared between versions"),
        ),
        (("one", "content", ""), ("two", "content", ""), ("three", "content", "")),
        down=True,
    ),
    "alias": Picture(
        (
            Box("alias", 0, 0.5, "sql@prod", "moves; its history stays", STRONG),
            Box("two", 2, 0, "sql:2", "where it was: rollback"),
            Box("three", 2, 1, "sql:3", "where it points", GREEN),
        ),
        (("alias", "three", "now"), ("alias", "two", "before")),
    ),
    "receipt": Picture(
        (
            Box("request", 0, 0.5, "a request", "model: sql@prod"),
            Box("engine", 1, 0.5, "one base, many adapters", "bytes verified when loaded"),
            Box("answer", 2, 0, "the answer", "SELECT ..."),
            Box("receipt", 2, 1, "its receipt", "digests of adapter and base", STRONG),
        ),
        (("request", "engine", ""), ("engine", "answer", ""), ("engine", "receipt", "")),
    ),
    "split": Picture(
        (
            Box("clients", 0, 0.5, "requests to sql@prod"),
            Box("now", 2, 0, "sql:3", "as before"),
            Box("next", 2, 1, "sql:4", "the candidate", STRONG),
        ),
        (("clients", "now", "9 of 10"), ("clients", "next", "1 of 10")),
    ),
    "probe": Picture(
        (
            Box("training", 0, 0, "after training", "a few fixed prompts"),
            Box("file", 1, 0, "probes.safetensors", "the largest logits", STRONG),
            Box("later", 2, 0, "asked again later", "equal, or refused", GREEN),
        ),
        (("training", "file", "recorded"), ("file", "later", "compared")),
    ),
}


def svg(picture: Picture) -> str:
    """The picture as the text of an SVG file."""
    width = max(box.column for box in picture.boxes) * COLUMN + WIDTH + 2 * MARGIN
    height = max(box.row for box in picture.boxes) * ROW + HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'font-family="sans-serif" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker></defs>',
    ]
    places = {box.name: (MARGIN + box.column * COLUMN, MARGIN + box.row * ROW) for box in picture.boxes}
    for start, end, words in picture.arrows:
        (x1, y1), (x2, y2) = places[start], places[end]
        down, right = (
            (x1 + WIDTH / 2, y1 + HEIGHT, x2 + WIDTH / 2, y2),
            (x1 + WIDTH, y1 + HEIGHT / 2, x2, y2 + HEIGHT / 2),
        )
        line = down if picture.down else right
        coordinates = 'x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}"'.format(*line)
        parts.append(f'<line {coordinates} stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>')
        if words:
            middle, above = (line[0] + line[2]) / 2, (line[1] + line[3]) / 2 - 6
            parts.append(f'<text x="{middle:g}" y="{above:g}" font-size="11" fill="{LINE}">{escape(words)}</text>')
    for box in picture.boxes:
        x, y = places[box.name]
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{box.fill}" stroke="{LINE}"/>'
        )
        above = y + (HEIGHT / 2 - 2 if box.small else HEIGHT / 2 + 5)
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{above:g}" font-size="14" fill="{INK}">{escape(box.text)}</text>')
        if box.small:
            parts.append(
                f'<text x="{x + WIDTH / 2:g}" y="{above + 18:g}" font-size="11" fill="{LINE}">{escape(box.small)}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write every picture."""
    for name, picture in PICTURES.items():
        (IMAGES / f"concept-{name}.svg").write_text(svg(picture))


if __name__ == "__main__":
    main()
