"""Where adapters live: references, manifest, validation, store. Imports no torch."""

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.reference import AdapterReference
from adapterhub_lite.registry.registry import AdapterRegistry

__all__ = ["AdapterManifest", "AdapterReference", "AdapterRegistry"]
