"""Machines and models that a plan may be asked about; none of them exists here."""

from typing import Any

import pytest

from adapterhub_lite.memory import Machine

GIB = 2**30
ALL_PACKAGES = frozenset({"bitsandbytes", "deepspeed", "flash_attn"})


@pytest.fixture(scope="session")
def machine() -> Any:
    """A function (GiB, device="cuda", world_size=1, capability=(9, 0), packages=all) -> Machine."""

    def make(
        gib: float,
        device: str = "cuda",
        world_size: int = 1,
        capability: tuple[int, int] | None = (9, 0),
        packages: frozenset[str] = ALL_PACKAGES,
    ) -> Machine:
        return Machine(device, int(gib * GIB), world_size, capability, packages)

    return make


@pytest.fixture(scope="session")
def qwen_7b() -> Any:
    """The shape of Qwen2.5-7B."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def small_config() -> Any:
    """The shape of a 4-layer Llama of 10 million parameters."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
