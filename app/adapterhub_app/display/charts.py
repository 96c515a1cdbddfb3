"""The page's two charts, as HTML and SVG of this module's own: memory by preset, and loss by step.

Colours come from style.css, for light and dark, and nothing has to be loaded to draw them. The bars are horizontal so
that names and totals stay readable on a phone.
"""

import math
import sys
from collections.abc import Sequence

from adapterhub_app.display.escape import in_template
from adapterhub_lite.memory.estimate import COMPONENTS

# A device more than this many times the largest bar would squeeze the bars: its line is left out.
_ROOM_FOR_THE_LINE = 3.0

# More points than this are a line without dots.
MOST_DOTS = 12

Bar = tuple[str, str, float]


def draw_plan(bars: Sequence[Bar], memory_gib: float) -> str:
    """Draw (preset, component, GiB) triples, those of the chosen preset first, against a device of `memory_gib`."""
    presets = list(dict.fromkeys(preset for preset, _, _ in bars))
    totals = {name: sum(gib for preset, _, gib in bars if preset == name) for name in presets}
    largest = max(totals.values(), default=0.0) or 1.0
    has_line = memory_gib <= _ROOM_FOR_THE_LINE * largest
    scale = 1.04 * max(largest, memory_gib if has_line else 0.0)
    line = f'<b style="left:{100 * memory_gib / scale:.2f}%"></b>' if has_line else ""
    rows = []
    for name in presets:
        own = sorted(((part, gib) for preset, part, gib in bars if preset == name), key=lambda bar: _place(bar[0]))
        pieces = "".join(
            f'<i class="{_colour(part)}" style="width:{100 * gib / scale:.2f}%" title="{in_template(part)} {gib:.2f} GiB"></i>'
            for part, gib in own
        )
        label = ", ".join(f"{part} {gib:.2f}" for part, gib in own)
        rows.append(
            f'<div role="row" class="plan-bar{" chosen" if name == presets[0] else ""}">'
            f'<span role="rowheader">{in_template(name)}</span><div role="cell" aria-label="{in_template(label)}">{pieces}{line}</div>'
            f'<span role="cell">{totals[name]:.1f}</span></div>'
        )
    used = sorted({part for _, part, _ in bars}, key=_place)
    legend = "".join(f'<li><i class="{_colour(part)}"></i>{in_template(part)}</li>' for part in used)
    device = f"The line is the device: {memory_gib:g} GiB." if has_line else f"The device holds {memory_gib:g} GiB."
    return (
        f'<figure class="plan-bars"><figcaption>GiB needed per device, by preset. {device}</figcaption>'
        f'<div role="table" aria-label="Memory by preset">{"".join(rows)}</div><ul>{legend}</ul></figure>'
    )


def _place(part: str) -> int:
    return COMPONENTS.index(part)


def _colour(part: str) -> str:
    return f"part-{part}"  # style.css has one per entry of COMPONENTS


def draw_loss(curve: Sequence[tuple[int, float]]) -> str:
    """Draw (step, loss) pairs as a line with labelled axes; non-finite losses are left out."""
    return draw_curves([("training", curve)])


def draw_curves(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw named curves of (step, loss) pairs over each other, with labelled axes; non-finite losses are left out."""
    found = [(name, [(step, loss) for step, loss in curve if math.isfinite(loss)]) for name, curve in curves]
    found = [(name, points) for name, points in found if points]
    if not found:
        return ""
    every = [point for _, points in found for point in points]
    width, height, left, bottom = 480, 170, 44, 22
    last, top = max(step for step, _ in every) or 1, round_up(max(loss for _, loss in every))

    def at(step: float, loss: float) -> tuple[float, float]:
        across = left + (width - left - 8) * step / last
        return round(across, 1), round(height - bottom - (height - bottom - 8) * max(loss, 0.0) / top, 1)

    lines = []
    for share in (0.0, 0.5, 1.0):
        x, y = at(0, share * top)
        lines.append(
            f'<path class="grid" d="M{x} {y}H{width - 8}"/><text x="{x - 6}" y="{y + 4}">{share * top:g}</text>'
        )
        x, y = at(share * last, 0)
        lines.append(f'<text class="below" x="{x}" y="{y + 16}">{round(share * last)}</text>')
    for number, (_, points) in enumerate(found):
        path = " ".join(f"{x},{y}" for x, y in (at(step, loss) for step, loss in points))
        dots = "".join(
            f'<circle class="curve-{number}" cx="{x}" cy="{y}" r="3"/>'
            for x, y in (at(step, loss) for step, loss in points if len(points) <= MOST_DOTS)
        )
        lines.append(f'<polyline class="curve-{number}" points="{path}"/>{dots}')
    said = "; ".join(
        f"{name.capitalize()} loss by step: from {points[0][1]:.3g} at step {points[0][0]} to {points[-1][1]:.3g} "
        f"at step {points[-1][0]}"
        for name, points in found
    )
    legend = "".join(
        f'<span class="curve-{number}">{in_template(name)}: {points[0][1]:.3g} at step {points[0][0]}, '
        f"{points[-1][1]:.3g} at step {points[-1][0]}</span>"
        for number, (name, points) in enumerate(found)
    )
    caption = in_template(said) if len(found) == 1 else f"Loss by step {legend}"
    return (
        f'<figure class="loss-curve"><figcaption>{caption}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{in_template(said)}">{"".join(lines)}</svg></figure>'
    )


def round_up(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten; 1 for zero and subnormal values, whose power of ten would be 0."""
    if value < sys.float_info.min:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if value <= step * power * (1 + 1e-9))
