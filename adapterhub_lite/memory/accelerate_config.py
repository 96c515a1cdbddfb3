"""What a plan means to `accelerate launch`: its YAML file, for one machine and for several. Knows presets alone."""

from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory.presets import MemoryPreset

TYPES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP"}


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
        raise ConfigurationError(f"Node {node_rank} is none of {nodes}: --node-rank counts from 0 to {nodes - 1}.")
    if nodes > 1 and not main_address:
        raise ConfigurationError(f"{nodes} nodes need the address of the first one: give --main-address.")
    kind = TYPES.get(preset.strategy, "DEEPSPEED")
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
