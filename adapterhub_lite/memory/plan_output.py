"""A plan as others read it: a table, a picture, and the YAML file of `accelerate launch`."""

from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.estimate import COMPONENTS, GIB
from adapterhub_lite.memory.plan import MemoryPlan
from adapterhub_lite.memory.presets import MemoryPreset

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
    end = min(BAR_WIDTH - 1, round(device * scale))
    table: list[tuple[str, ...]] = [("preset", "rows", "GiB", f"against {device / GIB:.1f} GiB")]
    for estimate in shown:
        bar, before = "", 0
        for letter, names in BAR_PARTS.items():
            before += sum(estimate.components[name] for name in names)
            bar = bar.ljust(round(before * scale), letter)
        if len(bar) > BAR_WIDTH:
            bar = bar[: BAR_WIDTH - 1] + ">"
        bar = f"{bar.ljust(end)}|" if len(bar) <= end else f"{bar[:end]}|{bar[end + 1 :]}"
        table.append((estimate.preset, str(estimate.workload.batch_size), f"{estimate.total / GIB:.2f}", bar))
    return table


def draw_plan(plan: MemoryPlan, path: str | Path) -> Path:
    """Write the stacked bars of the choice and of every rejected preset with an estimate, as a PNG; return its path."""
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


DISTRIBUTED_TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP"}


def accelerate_config(
    preset: MemoryPreset,
    *,
    devices: int,
    device: str = "cuda",
    nodes: int = 1,
    node_rank: int = 0,
    main_address: str = "",
    main_port: int = 29500,
) -> dict[str, Any]:
    """Accelerate's settings for `preset` on `devices` devices on each of `nodes` machines.

    Raises:
        ConfigurationError: several nodes without the first one's address, or a node that is not one of them.
    """
    if not 0 <= node_rank < nodes:
        raise ConfigurationError(f"There is no node {node_rank} of {nodes}: --node-rank counts from 0 to {nodes - 1}.")
    if nodes > 1 and not main_address:
        raise ConfigurationError(f"{nodes} nodes need the address of the first one: give --main-address.")
    kind = DISTRIBUTED_TYPES.get(preset.strategy, "DEEPSPEED")
    if kind == "NO" and devices * nodes > 1:
        # Whole weights are copied to each device.
        kind = "MULTI_GPU"
    if device == "cpu" and kind == "MULTI_GPU":
        kind = "MULTI_CPU"
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_machines": nodes,
        "num_processes": devices * nodes,
        "machine_rank": node_rank,
        "main_process_ip": main_address or None,
        "main_process_port": main_port if nodes > 1 else 0,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": device == "cpu",
        "mixed_precision": preset.mixed_precision or "no",
        "main_training_function": "main",
    }
    if kind == "DEEPSPEED":
        where = "cpu" if preset.offload else "none"
        settings["deepspeed_config"] = {
            "zero_stage": int(preset.strategy[-1]),
            # The run's own, whatever it is; DeepSpeed would hold it to a number.
            "gradient_accumulation_steps": "auto",
            "offload_optimizer_device": where,
            "offload_param_device": where,
            "zero3_init_flag": preset.strategy == "zero3",
        }
    if kind == "FSDP":
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_offload_params": preset.offload,
            "fsdp_activation_checkpointing": False,
        }
    return settings


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """Write `settings` as YAML for `accelerate launch --config_file`."""
    import yaml

    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return path
