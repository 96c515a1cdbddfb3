"""Many small LoRA adapters on one frozen base model: train them, keep them with proof, share them, serve them all.

The public names below are loaded on first use, so that `import adapterhub_lite` stays fast and imports no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "AdapterHubError": "adapterhub_lite.errors",
    "AdapterManifest": "adapterhub_lite.registry",
    "AdapterReference": "adapterhub_lite.registry",
    "AdapterRegistry": "adapterhub_lite.registry",
    "AdapterTrainer": "adapterhub_lite.training",
    "AdapterTrainingArguments": "adapterhub_lite.training",
    "GenerationRequest": "adapterhub_lite.serving",
    "GenerationResult": "adapterhub_lite.serving",
    "InferenceEngine": "adapterhub_lite.serving",
    "MEMORY_PRESETS": "adapterhub_lite.memory",
    "MemoryPlan": "adapterhub_lite.memory",
    "MemoryPreset": "adapterhub_lite.memory",
    "estimate_memory": "adapterhub_lite.memory",
    "linear_cross_entropy": "adapterhub_lite.losses",
    "merge_adapters": "adapterhub_lite.merging",
    "merge_into_base": "adapterhub_lite.merging",
    "plan_memory": "adapterhub_lite.memory",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list of literals, only sorted


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adapterhub_lite' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from adapterhub_lite.installation import explain_missing

        explained = explain_missing(error, name)
        if explained is None:
            raise
        raise explained from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
