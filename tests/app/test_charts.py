"""The charts: bars and lines where their figures are, and no markup but our own."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub_app.display.charts import draw_loss, draw_plan
from adapterhub_app.theme import STYLE_SHEET
from adapterhub_lite.memory.estimate import COMPONENTS

sizes = st.floats(min_value=0.001, max_value=500)
bars = st.lists(
    st.tuples(st.sampled_from(["lora-bf16", "<script>", "zero1"]), st.sampled_from(COMPONENTS), sizes),
    min_size=1,
    unique_by=lambda bar: bar[:2],
)


@given(bars, sizes)
def test_widths_are_in_proportion_and_stay_in_the_track(drawn: list[tuple[str, str, float]], memory: float) -> None:
    page = draw_plan(drawn, memory)
    widths = {
        (row, part): float(width)
        for number, row in enumerate(re.findall(r'<div role="cell" aria-label="[^"]*">(.*?)</div>', page))
        for part, width, row in [(*found, number) for found in re.findall(r'part-(\w+)" style="width:([\d.]+)%', row)]
    }
    presets = list(dict.fromkeys(preset for preset, _, _ in drawn))
    assert len(widths) == len(drawn)
    one = drawn[0]
    per_gib = widths[0, one[1]] / one[2]
    for preset, part, gib in drawn:
        assert abs(widths[presets.index(preset), part] - gib * per_gib) < 0.011 * (1 + gib / one[2])
    for number in range(len(presets)):
        assert sum(width for (row, _), width in widths.items() if row == number) <= 100.1
    lines = [float(left) for left in re.findall(r"<b style=\"left:([\d.]+)%", page)]
    assert all(left <= 100 for left in lines) and len(lines) in (0, len(presets))
    assert "<script>" not in page


def test_every_part_has_a_colour_of_its_own() -> None:
    style = STYLE_SHEET.read_text()
    colours = [re.search(rf"\.part-{part} {{ background: (#\w+)", style) for part in COMPONENTS]
    assert all(colours) and len({found[1] for found in colours if found}) == len(COMPONENTS)


losses = st.lists(st.tuples(st.integers(0, 10**6), st.floats(min_value=0, max_value=1e6)), min_size=2, max_size=50)


@given(losses)
@example([(0, 0.0), (1, 5e-324)])
def test_a_loss_curve_stays_in_its_picture_and_falls_where_the_loss_falls(curve: list[tuple[int, float]]) -> None:
    drawn = draw_loss(curve)
    found = re.search(r'points="([^"]+)"', drawn)
    assert found
    points = [tuple(map(float, point.split(","))) for point in found[1].split()]
    assert len(points) == len(curve)
    assert all(44 <= x <= 472 and 8 <= y <= 148 for x, y in points)
    for (_, first), (_, second), (_, low), (_, high) in zip(points, points[1:], curve, curve[1:], strict=False):
        assert (high >= low) == (second <= first) or first == second


def test_a_curve_that_left_the_numbers_is_drawn_as_far_as_it_goes() -> None:
    assert draw_loss([]) == "" and draw_loss([(1, float("nan"))]) == ""
    assert "to 2 at step 1" in draw_loss([(0, 3.0), (1, 2.0), (2, float("inf"))])
