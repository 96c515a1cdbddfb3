"""The merges that would be silently wrong, each refused with the reason and the way out."""

import json
from pathlib import Path

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.bases.broken import read_object
from adapterhub_lite.errors import BaseMismatchError, MergeError
from adapterhub_lite.registry import AdapterManifest

RECEIPT_FILE = "merge_receipt.json"


def refuse_variants(manifest: AdapterManifest) -> None:
    """Raise MergeError where an adapter is more than scaling * B @ A, and so does not add up with others."""
    if manifest.lora.use_dora:
        raise MergeError(
            f"{manifest.reference} is a DoRA adapter: its magnitudes depend on the base's weights and do not add up. "
            "Merge it into its base, or train it again without DoRA."
        )
    if manifest.lora.lora_bias:
        raise MergeError(
            f"{manifest.reference} trains LoRA biases, which a merged LoRA has no place for and would drop. "
            "Serve it by itself, or train it again with lora_bias=False."
        )
    if manifest.lora.also:
        raise MergeError(
            f"{manifest.reference} changes {', '.join(manifest.lora.also)} besides linear layers, which do not add up with "
            "others as pairs do. Merge it into its base."
        )


def refuse_base(manifest: AdapterManifest, base: ResolvedBase, *, from_pristine: bool) -> None:
    """Raise where the weights in `base` are not what this adapter can be added to.

    Raises:
        MergeError: merged already, quantised, or (unless `from_pristine`) trained over a quantised base.
        BaseMismatchError: another base.
    """
    receipt = base.folder / RECEIPT_FILE
    if receipt.is_file():
        raise MergeError(
            f"{base.name} already has an adapter merged into it ({_merged_digest(receipt)}). Merge into the pristine "
            "base; to have two adapters in one model, first merge them with merge_adapters."
        )
    config = read_object(base.folder / "config.json")
    if config.get("quantization_config"):
        raise MergeError(
            f"The weights of {base.name} are quantised: adding a delta and rounding again would lose most of it. "
            "Merge into the full-precision base and quantise the result."
        )
    if base.fingerprint != manifest.base.fingerprint:
        raise BaseMismatchError(
            f"{manifest.reference} was {manifest.base.difference(base.name, base.fingerprint, base.parts)}. "
            "Use the pristine base."
        )
    if manifest.base.quantization is not None and not from_pristine:
        raise MergeError(
            f"{manifest.reference} was trained over the base quantised as {manifest.base.quantization}, whose rounding "
            "it has learned to mend; on the full-precision weights it acts somewhat otherwise. Serve it unmerged on "
            "the quantised base, or accept that with from_pristine=True and evaluate the result."
        )


def refuse_tied(manifest: AdapterManifest, module: str) -> MergeError:
    """The error for a module whose weight belongs to another module too."""
    return MergeError(
        f"{manifest.reference} adapts {module!r}, whose weight the base shares with its embedding: adding to one would "
        "change both. Serve it unmerged, or let the merged model have a head of its own: untie=True (--untie)."
    )


def _merged_digest(receipt: Path) -> str:
    found = json.loads(receipt.read_bytes())
    return str(found.get("adapter_digest", "unknown"))
