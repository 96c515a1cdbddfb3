"""Probes of stored adapters: the base is loaded, the adapter put on it, and the probes asked. Torch on use."""

import tempfile
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.probes import PROBES_FILE, ProbeResult, read_probes, replay_probes, write_probes
from adapterhub_lite.bases import ResolvedBase, find_base, load_base_model, load_tokenizer
from adapterhub_lite.errors import BaseMismatchError, UsageError
from adapterhub_lite.registry.store.store import Store


def ensure_probes(folder: Path, base: ResolvedBase) -> ProbeResult | None:
    """Replay the probes of the (validated) adapter in `folder` on `base`, or record them where there are none.

    Raises:
        BaseMismatchError: the adapter behaves otherwise than recorded.
    """
    if (folder / PROBES_FILE).is_file():
        return check_probes(folder, base, folder.name)
    write_probes(adapted_model(folder, base), load_tokenizer(base.folder), folder)
    return None


def check_probes(folder: Path, base: ResolvedBase | None, subject: str, quantization: str | None = None) -> ProbeResult:
    """Replay the probes of the (validated) adapter in `folder` on `base`.

    Raises:
        UsageError: there is no base, or there are no probes to replay.
        BaseMismatchError: the adapter behaves otherwise than recorded.
    """
    if base is None:
        raise UsageError(f"The probes of {subject} need their base on this machine. Give base= (command line: --base).")
    if not (folder / PROBES_FILE).is_file():
        raise UsageError(f"{subject} carries no probes; take it in with verify='files'.")
    result = replay_probes(adapted_model(folder, base, quantization), folder)
    if not result.passed:
        raise BaseMismatchError(
            f"{subject} does not behave here as recorded: logits differ by up to {result.max_abs_difference:.3g}, "
            f"at most {result.tolerance:.3g} is explained by rounding. Another base, a wrong alpha or another "
            "quantisation would do this."
        )
    return result


def check_stored(store: Store, manifest: AdapterManifest, *, base: ResolvedBase | None = None) -> ProbeResult:
    """Replay the probes of a stored version on `base` (None: its own, where it is in this home).

    Raises:
        UsageError: there is no base, or there are no probes to replay.
        BaseMismatchError: the adapter behaves otherwise than recorded.
    """
    base = base or find_base(manifest.base, store.home)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in manifest.files:
            (folder / name).symlink_to(store.file(manifest, name))
        return check_probes(folder, base, manifest.reference, manifest.base.quantization)


def adapted_model(folder: Path, base: ResolvedBase, quantization: str | None = None) -> Any:
    """The base with the (validated) adapter in `folder` on it, in the dtype of its probes where it has them."""
    import torch
    from peft import PeftModel

    name = read_probes(folder).dtype if (folder / PROBES_FILE).is_file() else ""
    dtype = getattr(torch, name, None) if name in ("float32", "float16", "bfloat16") else None
    model = load_base_model(base.folder, dtype=dtype, quantization_config=_quantized(quantization, dtype))
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()


def _quantized(quantization: str | None, dtype: Any) -> Any:
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization.startswith("nf4"):
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    raise UsageError(f"This version cannot load a base quantised as {quantization!r}.")
