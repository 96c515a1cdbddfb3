"""What a run of the command line left behind."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: exit code and the two streams."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]
