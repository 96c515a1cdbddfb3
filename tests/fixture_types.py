"""The types of fixtures that several rooms use."""

from pathlib import Path
from typing import Any, Protocol


class MakeAdapter(Protocol):
    """The fixture `make_adapter`: write a plain PEFT adapter for `tiny_base` and return its folder."""

    def __call__(
        self,
        seed: int = 0,
        rank: int = 4,
        alpha: int = 8,
        targets: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"),
        **lora: Any,  # the other keywords of peft's LoraConfig
    ) -> Path:
        """`targets` are the adapted modules; the other settings are those of `LoraConfig`."""
        ...
