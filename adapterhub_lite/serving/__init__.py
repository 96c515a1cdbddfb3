"""Serving: one frozen base, many adapters, one mixed batch. No user interface, no training, no PEFT."""

from importlib import import_module
from typing import Any

_HOMES = {
    "EngineStatus": "engine.request",
    "GenerationChunk": "engine.request",
    "GenerationHandle": "engine.sequence",
    "GenerationRequest": "engine.request",
    "GenerationResult": "engine.request",
    "InferenceEngine": "engine.engine",
    "ResidentAdapter": "adapters.slots",
    "Timings": "engine.request",
    "TokenLogprob": "engine.request",
    "Usage": "engine.request",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list of literals, only sorted


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterhub_lite.serving' has no attribute {name!r}")
    value = getattr(import_module(f"adapterhub_lite.serving.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
