"""Memory: presets, estimates, plans. Knows a model's config and a machine, never data."""

from adapterhub_lite.memory.calibration import calibrated, record_peak
from adapterhub_lite.memory.estimate import (
    MemoryEstimate,
    ModelFacts,
    Workload,
    estimate,
    estimate_memory,
    facts_of,
    read_config,
)
from adapterhub_lite.memory.exact import dry_run
from adapterhub_lite.memory.plan import MemoryPlan, Rejection, plan_memory
from adapterhub_lite.memory.plan_output import BAR_LEGEND, draw_plan, plan_table
from adapterhub_lite.memory.preparation import best_attention, give_back_freed_memory, prepare_for_training
from adapterhub_lite.memory.presets import MEMORY_PRESETS, Machine, MemoryPreset, find_preset, refusal
from adapterhub_lite.memory.stand_ins import TARGETS, GivenAdapter
from adapterhub_lite.memory.tracing import build_model

__all__ = [
    "BAR_LEGEND",
    "MEMORY_PRESETS",
    "TARGETS",
    "GivenAdapter",
    "Machine",
    "MemoryEstimate",
    "MemoryPlan",
    "MemoryPreset",
    "ModelFacts",
    "Rejection",
    "Workload",
    "best_attention",
    "build_model",
    "calibrated",
    "draw_plan",
    "dry_run",
    "estimate",
    "estimate_memory",
    "facts_of",
    "find_preset",
    "give_back_freed_memory",
    "plan_memory",
    "plan_table",
    "prepare_for_training",
    "read_config",
    "record_peak",
    "refusal",
]
