"""The picture in the card: training loss by step as a small SVG, the same bytes for the same curve. Knows no files."""

from collections.abc import Sequence

LOSS_FILE = "loss.svg"
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40
MOST_POINTS = 400
TICKS = 5
# Beyond it nothing is a loss: NaN, infinity, a run that blew up.
LARGEST = 1e9


def draw_loss(curve: Sequence[tuple[int, float]]) -> bytes | None:
    """The SVG of (step, loss) pairs; None where fewer than two can be drawn. Long curves are thinned out."""
    points = sorted({step: loss for step, loss in curve if abs(loss) < LARGEST}.items())
    if len(points) < 2:
        return None
    points = [*points[: -1 : -(-len(points) // MOST_POINTS)], points[-1]]
    first, last = points[0][0], points[-1][0]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span = (high - low) or max(abs(high), 1.0)

    def x(step: float) -> str:
        return f"{LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(loss: float) -> str:
        return f"{TOP + (high - loss) / span * (HEIGHT - TOP - BOTTOM):.1f}"

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f"<title>Training loss, {points[0][1]:.4g} at step {first} to {points[-1][1]:.4g} at step {last}</title>",
        # A ground of its own, so that it can be read on a dark page too.
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for tick in range(TICKS):
        loss = low + span * tick / (TICKS - 1)
        parts.append(f'<path d="M{LEFT} {y(loss)}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss)}" dy="4" text-anchor="end">{loss:.3g}</text>')
        step = round(first + (last - first) * tick / (TICKS - 1))
        parts.append(f'<text x="{x(step)}" y="{bottom + 16}" text-anchor="middle">{step}</text>')
    line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>')
    parts.append(f'<text x="{(LEFT + right) // 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    parts.append(f'<text x="14" y="{HEIGHT // 2}" transform="rotate(-90 14 {HEIGHT // 2})">loss</text></svg>')
    return "\n".join(parts).encode() + b"\n"
