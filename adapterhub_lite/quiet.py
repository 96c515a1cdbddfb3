"""Keeps notices of other libraries off the terminal. Only for entry points: command line, quickstart, app."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LEVEL = "TORCH_CPP_LOG_LEVEL"


def quiet_libraries() -> None:
    """Hide notices of other libraries that a user cannot act on; errors and our own messages remain."""
    # bitsandbytes reports a missing optional kernel package at import; `doctor` reports it where it matters.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed warns at import that it found no GPU unless this variable says so.
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Progress bars are for terminals only; huggingface_hub reads this once, at import.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft 0.21 reads a property that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def quiet_rendezvous(nodes: int) -> Iterator[None]:
    """Silence torch's C++ stack traces, if it is imported inside, while this node waits for the others.

    Not for the processes of the run itself, whose failures need the trace.
    """
    if nodes < 2 or "RANK" in os.environ or LEVEL in os.environ:
        yield
        return
    os.environ[LEVEL] = "FATAL"
    try:
        yield
    finally:
        del os.environ[LEVEL]
