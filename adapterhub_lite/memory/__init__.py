"""Memory: presets, estimates, plans. Knows a model's config and a machine, never data."""

from adapterhub_lite.memory.estimate import MemoryEstimate, estimate_memory
from adapterhub_lite.memory.plan import MemoryPlan, Rejection, plan_memory
from adapterhub_lite.memory.presets import MEMORY_PRESETS, Machine, MemoryPreset, find_preset, refusal

__all__ = [
    "MEMORY_PRESETS",
    "Machine",
    "MemoryEstimate",
    "MemoryPlan",
    "MemoryPreset",
    "Rejection",
    "estimate_memory",
    "find_preset",
    "plan_memory",
    "refusal",
]
