"""Draws results/serving.png from the serving measurements that are there."""

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from scripts.bench.report import RESULTS

OURS, THEIRS = "#2a6f97", "#b0b0b0"


def _figures(part: str) -> dict[str, Any]:
    path = RESULTS / f"serving_{part}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _bars(axes: Any, values: dict[str, float], title: str) -> None:
    names = [name.replace("_", " ") for name in values]
    colours = [OURS if name.startswith("ours") or name.isdigit() else THEIRS for name in values]
    drawn = axes.barh(names, list(values.values()), color=colours)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set_title(title, loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw one panel a measurement."""
    panels = [
        (_figures("steps").get("seconds", {}), "One decode step of 16 rows, milliseconds", 1000.0),
        (
            _figures("throughput").get("tokens_per_second", {}),
            "16 requests, 8 adapters of ranks 4 to 16, tokens/s",
            1.0,
        ),
        (_figures("many").get("tokens_per_second_by_adapters", {}), "tokens/s by number of adapters, rank 8", 1.0),
    ]
    panels = [panel for panel in panels if panel[0]]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 2.6 * len(panels)), squeeze=False, layout="constrained")
    for (values, title, factor), place in zip(panels, axes[:, 0], strict=True):
        _bars(place, {name: factor * value for name, value in values.items()}, title)
    figure.savefig(RESULTS / "serving.png", dpi=120)


if __name__ == "__main__":
    main()
