"""`plan`: what a run will need, which preset fits, and why not the others."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, JsonOption, print_json, print_table, say
from adapterhub_lite.errors import ConfigurationError

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def plan(
    base: Annotated[str, typer.Argument(help="Base model: an embedded name, a folder or a Hub id.")],
    batch_size: Annotated[int, typer.Option(help="Rows an update, on each device.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Longest row, in tokens.")] = 1024,
    device_memory: Annotated[
        str | None, typer.Option(help="What each device has, for example 16GiB; this machine's when not given.")
    ] = None,
    devices: Annotated[int, typer.Option(help="How many devices.")] = 1,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    preset: Annotated[str, typer.Option(help="A memory preset by name; auto chooses.")] = "auto",
    picture: Annotated[Path | None, typer.Option(help="Also draw the stacked bars into this PNG.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say before a run what will fit and why, in bytes by component.

    Example: `adapterhub-lite plan smollm2-135m --sequence-length 2048 --device-memory 16GiB`
    """
    from adapterhub_lite.memory import draw_plan, plan_memory, plan_table

    found = plan_memory(
        base,
        batch_size=batch_size,
        sequence_length=sequence_length,
        device_memory=parse_bytes(device_memory) if device_memory else None,
        world_size=devices,
        rank=rank,
        preset=preset,
        home=home,
    )
    if picture is not None:
        draw_plan(found, picture)
    if as_json:
        return print_json(
            {
                "preset": found.preset.name,
                "predicted": {"total": found.predicted.total, **found.predicted.components},
                "batch_size": found.batch_size,
                "accumulation": found.accumulation,
                "reasons": list(found.reasons),
                "rejected": [asdict(rejection) for rejection in found.rejected],
            }
        )
    say(found.described())
    head, *rows = plan_table(found)
    print_table(f"Memory of a run on {base}", head, rows)


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as `16GiB`, `800 MB` or a number of bytes.

    Raises:
        ConfigurationError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigurationError(f"{text!r} is no amount of memory: wanted a number and a unit, as 16GiB or 800MB.")
    return int(float(match[1]) * unit)
