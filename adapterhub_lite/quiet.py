"""Keeps other libraries' chatter off a person's terminal. For the edges only: command line, quickstart, app."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LEVEL = "TORCH_CPP_LOG_LEVEL"


def quiet_libraries() -> None:
    """Hide notices of other libraries that a user can do nothing about; errors and our own words stay."""
    # bitsandbytes says at import that an optional kernel package is missing; `doctor` says so where it matters.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # DeepSpeed, where it is installed, says at import that it found no GPU, unless it is told so.
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Bars that redraw themselves are for a terminal; huggingface_hub reads this once, when it is imported.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft 0.21 reads a property that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def quiet_rendezvous(nodes: int) -> Iterator[None]:
    """Torch that is imported inside writes no pages of C++ frames while this node looks for the others.

    Not for the processes of the run itself, whose failures are worth a page.
    """
    if nodes < 2 or "RANK" in os.environ or LEVEL in os.environ:
        yield
        return
    os.environ[LEVEL] = "FATAL"
    try:
        yield
    finally:
        del os.environ[LEVEL]
