"""A plan as a picture and as a table: stacked bars per preset against the device's memory."""

from pathlib import Path

from adapterhub_lite.memory.estimate import COMPONENTS, GIB, MemoryEstimate
from adapterhub_lite.memory.plan import MemoryPlan


def plan_table(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """Rows of text, the header first: preset, GiB in all, GiB by component, verdict. The choice comes first."""
    header = ("preset", "GiB", *COMPONENTS, "verdict")
    rows = [_row(plan.predicted, "chosen: " + plan.reasons[0])]
    rows += [_row(r.predicted, r.reason) for r in plan.rejected if r.predicted is not None]
    return [header, *rows]


def _row(estimate: MemoryEstimate, verdict: str) -> tuple[str, ...]:
    parts = (f"{estimate.components[name] / GIB:.2f}" for name in COMPONENTS)
    return (estimate.preset, f"{estimate.total / GIB:.2f}", *parts, verdict)


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
