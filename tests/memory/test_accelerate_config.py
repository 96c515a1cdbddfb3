"""What is written for `accelerate launch` is read by it as it was meant, for one machine and for several."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory import MEMORY_PRESETS
from adapterhub_lite.memory.plan_output import accelerate_config, write_config

SEVERAL = {"devices": 4, "nodes": 2, "node_rank": 1, "main_address": "node0"}


def read_by_accelerate(tmp_path: Path, preset: str, **settings: Any) -> Namespace:
    path = write_config(tmp_path / "config.yaml", accelerate_config(MEMORY_PRESETS[preset], **settings))
    given = launch_command_parser().parse_args(["--config_file", str(path), "program.py"])
    return _validate_launch_command(given)[0]


@pytest.mark.parametrize("several", [{"devices": 4}, SEVERAL])
@pytest.mark.parametrize("preset", ["ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp", "fsdp-qlora"])
def test_each_strategy_is_understood(preset: str, several: dict[str, Any], tmp_path: Path) -> None:
    wanted = MEMORY_PRESETS[preset]
    args = read_by_accelerate(tmp_path, preset, **several)
    assert (args.multi_gpu, args.use_fsdp) == (preset == "ddp", wanted.strategy == "fsdp")
    assert args.use_deepspeed == wanted.strategy.startswith("zero")
    if args.use_deepspeed:
        assert (str(args.zero_stage), args.gradient_accumulation_steps) == (preset[4], "auto")
        assert args.offload_param_device == ("cpu" if wanted.offload else "none")
    if args.use_fsdp:
        assert int(args.fsdp_version) == 2
    nodes = several.get("nodes", 1)
    assert (args.num_processes, args.num_machines) == (4 * nodes, nodes)
    if nodes > 1:
        assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "node0", 29500)


def test_processes_on_a_cpu_are_understood(tmp_path: Path) -> None:
    args = read_by_accelerate(tmp_path, "ddp", devices=2, device="cpu")
    assert args.use_cpu and not args.multi_gpu and args.num_processes == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nodes": 2}, "give --main-address"),
        ({"nodes": 2, "main_address": "node0", "node_rank": 2}, "--node-rank counts"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        accelerate_config(MEMORY_PRESETS["ddp"], devices=4, **settings)
