"""Loading a resolved base into memory. The only place that calls `from_pretrained` for a base."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.bases.broken import check_loaded, read_by_transformers, read_object
from adapterhub_lite.bases.fingerprint import check_alone

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers; its setting is restored afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_base_model(
    folder: str | Path,
    *,
    dtype: "torch.dtype | None" = None,
    device: "str | torch.device" = "cpu",
    quantization_config: Any = None,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """Load the causal language model in `folder`, in evaluation mode; safetensors only, no code from the folder.

    `dtype` None keeps the dtype it was saved in; `attn_implementation` None lets transformers choose for the family.

    Raises:
        BrokenBaseError: transformers cannot load it, or its files are not those of the model that config.json describes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_alone(Path(folder))
    with no_progress_bars(), read_by_transformers("weights", folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(model, loaded[1], Path(folder))
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights for some CPUs at the first evaluation, and round their scales to
            # bf16: another base than the one that was trained on, and than the one on every other machine.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # not a parameter
    if quantization_config is None:
        # nn.Module's own `to`: the wrapper that transformers puts around it has no usable type.
        torch.nn.Module.to(model, device)
    return model


def saved_dtype(folder: str | Path) -> str:
    """The torch name of the dtype that the base in `folder` was saved in, as its configuration says."""
    config = read_object(Path(folder) / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in `folder`; if it has no padding token, the end token is used for it.

    Raises:
        BrokenBaseError: transformers cannot.
    """
    from transformers import AutoTokenizer

    with read_by_transformers("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
