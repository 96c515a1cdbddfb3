"""Probes of stored adapters: the base is loaded, the adapter put on it, and the probes asked. Torch on use."""

import tempfile
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.manifest import AdapterManifest
from adapterhub_lite.adapter_format.probes import PROBES_FILE, ProbeResult, read_probes, replay_probes, write_probes
from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.bases import ResolvedBase, find_base, load_base_model, load_tokenizer, saved_dtype
from adapterhub_lite.bases.fit import inspect_adapter
from adapterhub_lite.errors import BaseMismatchError, UsageError
from adapterhub_lite.registry.store.store import Store


def ensure_probes(folder: Path, base: ResolvedBase, quantization: str | None) -> ProbeResult | None:
    """Replay the probes of the (validated) adapter in `folder` on `base`, or record them where there are none.

    The base is quantised as it was when the adapter was trained: `quantization` is what the record says.

    Raises:
        UsageError: it cannot be quantised so here.
        BaseMismatchError: the adapter behaves otherwise than recorded.
    """
    if (folder / PROBES_FILE).is_file():
        return check_probes(folder, base, folder.name, quantization)
    write_probes(adapted_model(folder, base, quantization), load_tokenizer(base.folder), folder)
    return None


def check_probes(folder: Path, base: ResolvedBase | None, subject: str, quantization: str | None = None) -> ProbeResult:
    """Replay the probes of the (validated) adapter in `folder` on `base`.

    Raises:
        UsageError: there is no base, it cannot be quantised as recorded, or there are no probes to replay.
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
        UsageError: there is no base, it cannot be quantised as recorded, or there are no probes to replay.
        BaseMismatchError: the adapter behaves otherwise than recorded.
    """
    base = base or find_base(manifest.base, store.home)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in manifest.files:
            (folder / name).symlink_to(store.file(manifest, name))
        return check_probes(folder, base, manifest.reference, manifest.base.quantization)


def adapted_model(folder: Path, base: ResolvedBase, quantization: str | None = None) -> Any:
    """The base with the (validated) adapter in `folder` on it, in the dtype of its probes, or else in its own.

    `quantization` is what a record says of the base; it is quantised in the same way.

    Raises:
        UsageError: it cannot be quantised so here.
    """
    import torch
    from peft import PeftModel

    try:
        kind = Quantization.of(quantization)
    except ValueError as error:
        raise UsageError(f"The probes cannot be asked as they were recorded: {error}.") from None
    name = read_probes(folder).dtype if (folder / PROBES_FILE).is_file() else saved_dtype(base.folder)
    dtype = getattr(torch, name if name in ("float32", "float16", "bfloat16") else "float32")
    config = kind.bitsandbytes(dtype) if kind else None
    model = load_base_model(base.folder, dtype=dtype, quantization_config=config)
    found = inspect_adapter(folder, base=base)
    if found.brings_tokens:
        model.resize_token_embeddings(found.rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()
