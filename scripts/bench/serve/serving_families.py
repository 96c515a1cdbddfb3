"""Whether bases of today's families are served as fast as one of Llama's kind, all of SmolLM2-135M's widths; and hybrids."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner

ROWS = 16
CONTEXT = 64
PROMPT = 256
WIDTHS: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 64},
    "smollm3": {"use_sliding_window": False},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    "phi3": {"sliding_window": None},
    "olmo2": {},
}


# A few layers of each kind that they have.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 3},
    "qwen3_5_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 3},
    "falcon_h1": {"mamba_d_ssm": 1_152, "mamba_n_heads": 18, "mamba_d_head": 64},
}


def random_runner(family: str, settings: dict[str, Any], kind: ForwardKind | None = None) -> ModelRunner:
    """A base of a family with random weights, in bfloat16, ready to compute."""
    config = AutoConfig.for_model(family, **WIDTHS | settings)
    torch.manual_seed(0)
    return ModelRunner(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), rows=ROWS, kind=kind)


def measure_hybrids(_base: ResolvedBase, _scratch: Path, rounds: int = 7) -> dict[str, Any]:
    """Seconds of a step in which 16 rows of a hybrid of 9 layers write, stacked in one batch and row by row."""
    seconds: dict[str, dict[str, float]] = {}
    ratios = {}
    for family, settings in HYBRIDS.items():
        runners = {
            kind: random_runner(family, {"num_hidden_layers": 9, **settings}, kind)
            for kind in (ForwardKind.STACKED, ForwardKind.ROWS)
        }
        taken: dict[ForwardKind, list[float]] = {kind: [] for kind in runners}
        for at in range(rounds + 2):
            for kind, runner in runners.items():
                slices = [RowSlice(row, 20 + at - 1 if at else 0, [5] * (1 if at else 20)) for row in range(ROWS)]
                started = time.perf_counter()
                runner.forward(pack(slices))
                if at > 1:
                    taken[kind].append(time.perf_counter() - started)
        seconds[family] = {str(kind): statistics.median(values) for kind, values in taken.items()}
        pairs = zip(taken[ForwardKind.STACKED], taken[ForwardKind.ROWS], strict=True)
        ratios[family] = statistics.median(one / other for one, other in pairs)
    return {"seconds": seconds, "stacked_over_row_by_row": ratios}


def measure_families(_base: ResolvedBase, _scratch: Path, rounds: int = 15) -> dict[str, Any]:
    """Seconds of a step that writes, of 16 rows and of one, and of one that reads 256 tokens; ratios to Llama's."""
    runners = {family: random_runner(family, settings) for family, settings in FAMILIES.items()}
    context = list(range(100, 100 + CONTEXT))
    steps = {
        "write_16_rows": [RowSlice(row, CONTEXT, [5]) for row in range(ROWS)],
        "write_1_row": [RowSlice(0, CONTEXT, [5])],
        "read_256_tokens": [RowSlice(0, 0, list(range(100, 100 + PROMPT)))],
    }
    ways: dict[tuple[str, str], Callable[[], object]] = {}
    for family, runner in runners.items():
        runner.forward(pack([RowSlice(row, 0, context) for row in range(ROWS)]))
        for kind, slices in steps.items():
            step = pack(slices)
            ways[kind, family] = lambda runner=runner, step=step: runner.forward(step)  # type: ignore[misc]
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if round_ > 1:
                taken[name].append(time.perf_counter() - started)

    def ratio(kind: str, family: str) -> float:
        # Round by round: what else the machine does in a round slows both.
        return statistics.median(a / b for a, b in zip(taken[kind, family], taken[kind, "llama"], strict=True))

    return {
        "forward": {family: str(runner.kind) for family, runner in runners.items()},
        "seconds": {kind: {f: statistics.median(taken[kind, f]) for f in FAMILIES} for kind in steps},
        "over_llama": {kind: {family: ratio(kind, family) for family in FAMILIES} for kind in steps},
    }
