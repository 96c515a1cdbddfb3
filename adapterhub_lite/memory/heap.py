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
    """Give back what loading left behind; for presets that save memory, go on so before each block, either way.

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
                if not preset.gradient_checkpointing:
                    # Under checkpointing the blocks come by once more in the backward pass, and look themselves.
                    layer.register_forward_hook(trim.before_backward)
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
        if not torch.compiler.is_compiling():
            self._trim()

    def before_backward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Look again when the gradient comes back to this layer."""
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad and not torch.compiler.is_compiling():
            states.register_hook(self._look)

    def _look(self, gradient: torch.Tensor) -> None:
        self._trim()

    def _trim(self) -> None:
        if _resident_bytes() - self._resident >= SLACK_BYTES:
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
