"""Where adapters live: references, manifest, validation, store. Imports no torch."""

from adapterhub_lite.adapter_format.manifest import AdapterManifest, AdapterReference
from adapterhub_lite.registry.registry import AdapterRegistry

__all__ = ["AdapterManifest", "AdapterReference", "AdapterRegistry"]
