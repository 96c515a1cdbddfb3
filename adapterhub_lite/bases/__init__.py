"""Base models: a name in, a folder with a fingerprint out. Knows nothing of training or serving."""

from adapterhub_lite.bases.fingerprint import ResolvedBase, base_fingerprint
from adapterhub_lite.bases.fit import base_modules, stored_modules
from adapterhub_lite.bases.load import load_base_model, load_tokenizer, saved_dtype
from adapterhub_lite.bases.resolve import EMBEDDED_BASES, find_base, known_bases, resolve_base

__all__ = [
    "EMBEDDED_BASES",
    "ResolvedBase",
    "base_fingerprint",
    "base_modules",
    "find_base",
    "known_bases",
    "load_base_model",
    "load_tokenizer",
    "resolve_base",
    "saved_dtype",
    "stored_modules",
]
