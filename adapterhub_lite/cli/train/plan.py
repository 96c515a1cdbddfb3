"""`plan`: what a run will need, which preset fits, and why not the others."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import options_from
from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.training.settings import PlanRequest

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@options_from(PlanRequest)
def plan(
    base: Annotated[str, typer.Argument(help="Base model: an embedded name, a folder or a Hub id.")],
    given: dict[str, Any],
    data: Annotated[
        str | None,
        typer.Option(help="Rows to take the lengths from: a JSONL or parquet file, or a data set's id on the Hub."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Also run the step on fake tensors; takes a minute.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the stacked bars into this PNG.")] = None,
    write_accelerate_config: Annotated[
        Path | None, typer.Option(help="Also write what the plan means for `accelerate launch` into this YAML file.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what a run will need and which preset fits, in bytes by component. No weights are downloaded.

    Example: `adapterhub-lite plan smollm2-135m --sequence-length 2048 --device-memory 16GiB`
    """
    from adapterhub_lite.memory import BAR_LEGEND, draw_plan, dry_run, plan_memory, plan_table
    from adapterhub_lite.memory.plan_output import accelerate_config, write_config

    request = PlanRequest(**given)
    lengths = None
    if data:
        from adapterhub_lite.training.data.lengths import measure_rows

        lengths = measure_rows(base, data, max_length=request.sequence_length)
    found = plan_memory(
        base,
        batch_size=request.batch_size, rank=request.rank, target_modules=request.target_modules,
        sequence_length=lengths.of_step(request.batch_size) if lengths else request.sequence_length,
        device_memory=parse_bytes(request.device_memory) if request.device_memory else None,
        world_size=request.devices * request.nodes, preset=request.preset, home=home,
    )  # fmt: skip
    run_dry = dry_run(base, found.preset, found.predicted.workload) if exact else None
    if picture is not None:
        draw_plan(found, picture)
    if write_accelerate_config is not None:
        settings = accelerate_config(
            found.preset, devices=request.devices, device=found.predicted.workload.device, nodes=request.nodes,
            node_rank=request.node_rank, main_address=request.main_address,
        )  # fmt: skip
        write_config(write_accelerate_config, settings)
    if as_json:
        document = {
            "preset": found.preset.name, "predicted": {"total": found.predicted.total, **found.predicted.components},
            "batch_size": found.batch_size, "accumulation": found.accumulation,
            "sequence_length": found.predicted.workload.sequence_length, "reasons": list(found.reasons),
            "rejected": [asdict(rejection) for rejection in found.rejected], "exact_total": run_dry,
        }  # fmt: skip
        return print_json(document)
    exactly = [] if run_dry is None else [f"run on fake tensors: {run_dry / 2**30:.2f} GiB"]
    for text in (lengths.described() if lengths else assumed(request), found.described(), *exactly):
        say(text)
    head, *rows = plan_table(found)
    print_table(f"Memory of a run on {base}", head, rows)
    say(BAR_LEGEND)


def assumed(request: PlanRequest) -> str:
    """What a plan takes for granted that was shown no rows."""
    return (
        f"for rows of {request.sequence_length} tokens, {request.batch_size} for each update: "
        "--data measures yours, --sequence-length and --batch-size say other numbers"
    )


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as `16GiB`, `800 MB` or a number of bytes.

    Raises:
        ConfigurationError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigurationError(
            f"{text!r} is not an amount of memory: expected a number and a unit, such as 16GiB or 800MB."
        )
    return int(float(match[1]) * unit)
