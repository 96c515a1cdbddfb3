"""The picture of scripts/bench/train/loss.py: time and peak of each contestant, one group a problem."""

from pathlib import Path
from typing import Any


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and MB of each contestant, one group of bars a problem, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5))
    names = list(dict.fromkeys(name for result in results for name in result["contestants"]))
    for axis, key, title in zip(
        axes, ("seconds_median", "peak_bytes"), ("time (s, median)", "peak above the inputs (MB)"), strict=True
    ):
        for offset, name in enumerate(names):
            found = [(i, r["contestants"][name][key]) for i, r in enumerate(results) if name in r["contestants"]]
            heights = [value / (1e6 if key == "peak_bytes" else 1) for _, value in found]
            axis.bar([i + offset * 0.2 for i, _ in found], heights, 0.19, label=name)
        axis.set_xticks([i + 0.3 for i in range(len(results))])
        axis.set_xticklabels([r["problem"]["name"] for r in results], rotation=15, fontsize=8)
        axis.set_title(title)
        axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
