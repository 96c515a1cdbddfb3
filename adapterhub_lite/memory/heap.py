"""Freed memory given back to the system on a CPU with glibc. Knows torch and transformers' layers, no model of its own."""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from adapterhub_lite.memory.presets import MemoryPreset

# So much may be resident and free before it is looked for.
SLACK_BYTES = 128 * 2**20


def give_back_freed_memory(model: Any, preset: MemoryPreset) -> None:
    """Give back what loading left behind; for presets that save memory, go on so before each block of each layer.

    glibc keeps what is freed, scattered between what still lives: a third of the peak of a checkpointed step of 8 x 1024
    tokens. `M_MMAP_THRESHOLD` would return every large block at once, but then every one is faulted in anew, which
    takes half of the time again. Presets that go for speed keep what they have.
    """
    # Not at the top: estimates, which import this room, need no layers of transformers.
    from transformers.modeling_layers import GradientCheckpointingLayer

    if trim_heap() and preset.trims_heap:
        trim = _Trim()
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                for block in layer.children():
                    # Attention and feed-forward; a norm or a dropout has nothing in it.
                    if any(True for _ in block.children()):
                        block.register_forward_pre_hook(trim)


def trim_heap() -> bool:
    """Give back what is free in the C heap now; False where the heap is not glibc's."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
    return libc is not None


class _Trim:
    """A hook that gives back once more than the slack has come since it last did. Holds no handle: models are copied."""

    def __init__(self) -> None:
        self._resident = _resident_bytes()

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        """Look, and perhaps trim."""
        if torch.compiler.is_compiling() or _resident_bytes() - self._resident < SLACK_BYTES:
            return
        trim_heap()
        self._resident = _resident_bytes()


@lru_cache(maxsize=1)
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
