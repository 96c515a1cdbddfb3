"""A setting: a dataclass field with its help, from which command line and YAML keys are derived. Standard library only."""

from dataclasses import field
from typing import Any


def setting(default: Any, help_text: str) -> Any:
    """Return a dataclass field with `default`, described by `help_text` to whoever reads the `--help`."""
    return field(default=default, metadata={"help": help_text})
