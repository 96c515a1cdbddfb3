"""One word for each way to quantise a base; what a record holds comes back as what made it, or is refused."""

import json
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from adapterhub_lite.adapter_format.quantization import Quantization


@pytest.mark.parametrize("kind", list(Quantization))
def test_every_way_that_it_is_written_down_is_read_back(kind: Quantization) -> None:
    config = kind.bitsandbytes(torch.float16)
    assert Quantization.of(kind.value) is kind
    assert Quantization.of(config) is kind
    assert Quantization.of(config.to_dict()) is kind
    assert Quantization.of(json.dumps(config.to_dict(), default=str)) is kind
    assert Quantization.describe(config) == kind.value


@pytest.mark.parametrize("nothing", [None, "", "none"])
def test_no_quantisation_is_none(nothing: Any) -> None:
    assert Quantization.of(nothing) is None and Quantization.describe(nothing) is None


@pytest.mark.parametrize(
    "odd",
    [
        "fp3",
        "[]",
        "{" * 100_000,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {},
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0),
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"]),
    ],
    ids=lambda odd: str(odd)[:30],
)
def test_what_cannot_be_made_again_is_not_guessed(odd: Any) -> None:
    with pytest.raises(ValueError, match="quantis"):
        Quantization.of(odd)
    assert Quantization.describe(odd)


def test_settings_that_change_no_size_can_be_overlooked() -> None:
    odd = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    assert Quantization.of(odd, exact=False) is Quantization.INT8
