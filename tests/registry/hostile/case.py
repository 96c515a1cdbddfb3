"""What a hostile case is, and the two ways of putting a file that most of them use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "adapterhub.json"
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One hostile or broken adapter: `spoil` makes it from a copy of a sound one.

    It comes in by `add`, or with its manifest by `pull`; `reason` is a pattern that the refusal has to match.
    """

    name: str
    spoil: Spoil
    reason: str
    door: Literal["add", "pull"] = "add"


def put(path: Path, content: bytes) -> None:
    """Write a file, in place of what was there."""
    path.write_bytes(content)


def beside(name: str, content: bytes = b"x") -> Spoil:
    """Put another file into the folder."""
    return lambda folder: put(folder / name, content)
