"""Serving: one frozen base, many adapters, one mixed batch. No user interface, no training, no PEFT.

Reading order: request, blend, source, hub_source, weights, host_tier, residency, rollout, pool; packing, direct_attention, cache,
bank, direct, hosted, fused, trunk; sampling, text, job, scheduler, loop, engine.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "EngineStatus": "request",
    "GenerationChunk": "request",
    "GenerationHandle": "job",
    "GenerationRequest": "request",
    "GenerationResult": "request",
    "InferenceEngine": "engine",
    "ResidentAdapter": "residency",
    "Timings": "request",
    "TokenLogprob": "request",
    "Usage": "request",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list of literals, only sorted


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterhub_lite.serving' has no attribute {name!r}")
    value = getattr(import_module(f"adapterhub_lite.serving.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
