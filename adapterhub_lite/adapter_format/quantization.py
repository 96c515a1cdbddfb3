"""How a base is quantised: one list of the kinds that can be made again, what makes each, and how records name them.

A quantised base answers a little otherwise than the base itself, and an adapter trained over it has learned to mend
that: whatever asks an adapter what it was asked before has to quantise the base as it was quantised then.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

DEFAULT_INT8_THRESHOLD = 6.0


class Quantization(StrEnum):
    """A kind of quantisation of bitsandbytes; the value is its short word, in settings, manifests and messages.

    `nf4` quantises its constants too (QLoRA, arXiv:2305.14314), `nf4-single` does not; so with `fp4`.
    """

    INT8 = "int8"
    NF4 = "nf4"
    NF4_SINGLE = "nf4-single"
    FP4 = "fp4"
    FP4_SINGLE = "fp4-single"

    @classmethod
    def of(cls, found: Any, *, exact: bool = True) -> "Quantization | None":
        """What a record, a setting or a model's configuration says: None, a short word, JSON, a mapping, or an object.

        Not `exact`: settings that change the numbers but not the size of what is stored are overlooked.

        Raises:
            ValueError: it names a quantisation that cannot be made again here; the text says which.
        """
        if found is None or found in ("", "none"):
            return None
        if isinstance(found, str):
            if found in cls._value2member_map_:
                return cls(found)
            found = _parsed(found)
        settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
        return _of_settings(settings, exact)

    @classmethod
    def describe(cls, found: Any) -> str | None:
        """What a record keeps of a model's configuration: the short word, or its JSON where there is none for it."""
        try:
            return cls.of(found)
        except ValueError:
            return json.dumps(found.to_dict() if hasattr(found, "to_dict") else found, sort_keys=True, default=str)

    def bitsandbytes(
        self, compute_dtype: "torch.dtype | None" = None, storage: "torch.dtype | None" = None
    ) -> "BitsAndBytesConfig":
        """The configuration for `from_pretrained`; the output head is left as it is.

        `compute_dtype` is what 4-bit weights are unpacked to (bf16 by default), `storage` what they are packed into:
        FSDP can only split storage of one dtype (bitsandbytes#970).
        """
        import torch
        from transformers import BitsAndBytesConfig

        if self is Quantization.INT8:
            return BitsAndBytesConfig(load_in_8bit=True)
        kind, _, single = self.value.partition("-")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=not single,
            bnb_4bit_compute_dtype=compute_dtype or torch.bfloat16,
            bnb_4bit_quant_storage=storage or torch.uint8,
        )


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{text!r:.80} is no quantisation; known are {', '.join(Quantization)}")
    return found


def _of_settings(settings: Mapping[str, Any], exact: bool) -> Quantization:
    """The kind that a configuration of bitsandbytes makes; what changes the weights otherwise has no word."""
    method = str(settings.get("quant_method", "bitsandbytes")).rpartition(".")[2].lower()
    eight, four = (settings.get(key) or settings.get(f"_{key}") for key in ("load_in_8bit", "load_in_4bit"))
    if method not in ("bitsandbytes", "bits_and_bytes") or bool(eight) == bool(four):
        raise ValueError(
            f"a base quantised by {method!r:.40} cannot be made again; known are {', '.join(Quantization)}"
        )
    usual: dict[str, tuple[Any, ...]] = {
        "llm_int8_skip_modules": (None, []),
        "llm_int8_threshold": (DEFAULT_INT8_THRESHOLD,),
    }
    odd = [key for key, values in usual.items() if exact and settings.get(key, values[0]) not in values]
    kind = "int8" if eight else str(settings.get("bnb_4bit_quant_type", "fp4"))
    if four and not settings.get("bnb_4bit_use_double_quant", False):
        kind += "-single"
    if odd or kind not in Quantization._value2member_map_:
        raise ValueError(f"a base quantised as {kind:.40} with its own {', '.join(odd) or 'type'} cannot be made again")
    return Quantization(kind)
