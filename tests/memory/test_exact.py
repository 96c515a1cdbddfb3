"""The dry run counts every layer and state; the estimate from two layers agrees with it, and so does the picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.memory import Rejection, Workload, draw_plan, dry_run, estimate_memory, plan_memory, plan_table
from adapterhub_lite.memory.estimate import COMPONENTS, OVERHEAD_BYTES


@pytest.mark.parametrize("name", ["lora-bf16", "lora-fp32", "lora-bf16-gc", "full", "head-only", "qlora-nf4"])
def test_the_estimate_is_near_the_dry_run(small_config: Any, name: str) -> None:
    overhead = OVERHEAD_BYTES["cpu"]
    exact = dry_run(small_config, name, Workload(8, 128)) - overhead
    reckoned = estimate_memory(small_config, name, batch_size=8, sequence_length=128).total - overhead
    assert reckoned == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("name", ["lora-bf16", "qlora-nf4-gc", "lora-int8", "full"])
def test_so_it_is_for_a_model_with_biases_on_a_gpu(name: str) -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    overhead = OVERHEAD_BYTES["cuda"]
    exact = dry_run(config, name, Workload(4, 700, device="cuda")) - overhead
    reckoned = estimate_memory(config, name, batch_size=4, sequence_length=700, device="cuda").total - overhead
    assert reckoned == pytest.approx(exact, rel=0.1)


def test_a_preset_over_devices_is_not_run_dry(small_config: Any) -> None:
    with pytest.raises(ConfigurationError, match="estimate it"):
        dry_run(small_config, "zero2", Workload(1, 8, world_size=2))


def test_a_plan_can_be_drawn_and_tabled(small_config: Any, machine: Any, tmp_path: Path) -> None:
    plan = plan_memory(small_config, batch_size=4, sequence_length=64, machine=machine(40))
    path = draw_plan(plan, tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    header, chosen, *others = plan_table(plan)
    assert header == ("preset", "rows", "GiB", "against 40.0 GiB")
    assert chosen[:2] == ("lora-bf16", "4")
    assert {row[0] for row in others} == {r.preset for r in plan.rejected if r.predicted}


def test_a_bar_has_the_parts_in_their_size_and_the_end_of_the_device(small_config: Any, machine: Any) -> None:
    plan = plan_memory(small_config, batch_size=4, sequence_length=64, machine=machine(1))
    components = dict.fromkeys(COMPONENTS, 0) | {"weights": 256 << 20, "activations": 128 << 20, "overhead": 128 << 20}
    half = replace(plan.predicted, components=components)
    double = replace(plan.predicted, components={**components, "activations": 4 << 30})
    rows = plan_table(replace(plan, predicted=half, rejected=(Rejection("full", double, "too large"),)))
    # Twice the device is shown: half of the bar is the device, and a larger need runs out of it.
    assert rows[1][-1] == "wwwww" + "aaa" + "oo" + " " * 10 + "|"
    assert rows[2][-1] == "wwwww" + "a" * 15 + "|" + "a" * 18 + ">"
