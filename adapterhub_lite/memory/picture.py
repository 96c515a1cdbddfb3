"""A plan as a picture and as a table: stacked bars per preset against the device's memory."""

from pathlib import Path

from adapterhub_lite.memory.estimate import COMPONENTS, GIB, MemoryEstimate
from adapterhub_lite.memory.plan import MemoryPlan

BAR_WIDTH = 40
BAR_PARTS = {
    "w": ("weights", "quantization"),
    "t": ("adapter", "gradients", "optimizer"),
    "a": ("activations",),
    "l": ("loss", "temporary"),
    "o": ("overhead",),
}
BAR_LEGEND = (
    "w weights, t what is trained (adapter, gradients, optimizer), a activations, l loss and temporary, o overhead"
)


def plan_table(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """Rows of text, the header first: preset, rows at a time, GiB, and a bar against the device's memory.

    The choice comes first. A bar's letters are those of `BAR_LEGEND`; `|` is where the device's memory ends.
    """
    shown = [plan.predicted, *(r.predicted for r in plan.rejected if r.predicted is not None)]
    device = plan.machine.memory_bytes
    scale = BAR_WIDTH / max(device, min(2 * device, max(estimate.total for estimate in shown)))
    header = ("preset", "rows", "GiB", f"against {device / GIB:.1f} GiB")
    return [header, *(_row(estimate, scale, device) for estimate in shown)]


def _row(estimate: MemoryEstimate, scale: float, device: int) -> tuple[str, ...]:
    bar, before = "", 0
    for letter, names in BAR_PARTS.items():
        before += sum(estimate.components[name] for name in names)
        bar = bar.ljust(round(before * scale), letter)
    if len(bar) > BAR_WIDTH:
        bar = bar[: BAR_WIDTH - 1] + ">"
    end = min(BAR_WIDTH - 1, round(device * scale))
    bar = f"{bar.ljust(end)}|" if len(bar) <= end else f"{bar[:end]}|{bar[end + 1 :]}"
    return (estimate.preset, str(estimate.workload.batch_size), f"{estimate.total / GIB:.2f}", bar)


def draw_plan(plan: MemoryPlan, path: str | Path) -> Path:
    """Write the stacked bars of the choice and of every rejected preset that was reckoned, as a PNG; return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [plan.predicted, *(r.predicted for r in plan.rejected if r.predicted is not None)]
    # A figure of its own, not pyplot's: nothing global is touched, so that any thread may draw.
    figure = Figure(figsize=(10, 0.45 * len(shown) + 1.6))
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    left = [0.0] * len(shown)
    for component in COMPONENTS:
        sizes = [estimate.components[component] / GIB for estimate in shown]
        if any(sizes):
            axis.barh(range(len(shown)), sizes, left=left, label=component)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.axvline(plan.machine.memory_bytes / GIB, color="black", linestyle="--", label="device")
    axis.set_yticks(range(len(shown)), [f"{e.preset} ({e.workload.batch_size} rows)" for e in shown])
    axis.invert_yaxis()
    axis.set_xlabel("GiB")
    axis.set_title(f"chosen: {plan.preset.name}")
    axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path
