"""Keeps other libraries' chatter off a person's terminal. For the edges only: command line, quickstart, app."""

import logging
import warnings


def quiet_libraries() -> None:
    """Hide notices of other libraries that a user can do nothing about; errors and our own words stay."""
    # bitsandbytes says at import that an optional kernel package is missing; `doctor` says so where it matters.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft 0.21 reads a property that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
