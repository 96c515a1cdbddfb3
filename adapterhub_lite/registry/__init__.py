"""Where adapters live: references, manifest, validation, store. Imports no torch."""

from adapterhub_lite.registry.manifest import AdapterManifest
from adapterhub_lite.registry.reference import AdapterReference
from adapterhub_lite.registry.store import AdapterRegistry

__all__ = ["AdapterManifest", "AdapterReference", "AdapterRegistry"]
