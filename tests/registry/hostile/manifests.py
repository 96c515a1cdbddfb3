"""Adapters whose manifest lies, or no longer fits what came with it."""

import json
from pathlib import Path
from typing import Any

from tests.registry.hostile.case import MANIFEST, WEIGHTS, Case, Spoil, beside, put


def manifest(**changes: Any) -> Spoil:
    """Set keys of adapterhub.json; a dict is merged into the one there."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / MANIFEST).read_text())
        for key, value in changes.items():
            found[key] = (
                {**found[key], **value} if isinstance(value, dict) and isinstance(found.get(key), dict) else value
            )
        (folder / MANIFEST).write_text(json.dumps(found))

    return spoil


def _flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-7] ^= 0x10
    put(folder / WEIGHTS, bytes(content))


EVIL_FILE = {"sha256": "0" * 64, "size": 1}
PULL_CASES = [
    Case("flipped byte", _flip, "adapter_model.safetensors of .* is damaged", "pull"),
    Case("path traversal in a file name", manifest(files={"../../evil.py": EVIL_FILE}), "lists other files", "pull"),
    Case("absolute file name", manifest(files={"/etc/cron.d/evil": EVIL_FILE}), "lists other files", "pull"),
    Case("pickle in the manifest", manifest(files={"adapter_model.bin": EVIL_FILE}), "lists other files", "pull"),
    Case("path traversal in the name", manifest(name="../../x"), "name: .*|name '../../x'", "pull"),
    Case("path traversal in the revision", manifest(base={"revision": "../../x"}), "not a 40-hex commit", "pull"),
    Case("a digest that lies", manifest(digest="sha256:" + "0" * 64), "its files make", "pull"),
    Case("a scaling that lies", manifest(lora={"scaling": 1.0}), "describes another LoRA", "pull"),
    Case("a count that lies", manifest(lora={"modules_bound": 5}), "describes another LoRA", "pull"),
    Case("NaN in a metric", lambda folder: _nan_metric(folder), "not a manifest", "pull"),
    Case("unknown key in the manifest", manifest(post_install="curl x | sh"), "post_install", "pull"),
    Case("no manifest", lambda folder: (folder / MANIFEST).unlink(), "no adapterhub.json", "pull"),
    Case(
        "manifest of ten megabytes",
        lambda folder: put(folder / MANIFEST, b" " * (10 << 20)),
        "at most 1048576",
        "pull",
    ),
    Case("manifest nested deep", lambda folder: put(folder / MANIFEST, b'{"a":' * 100_000), "not a manifest", "pull"),
    Case("manifest behind a link", lambda folder: _linked_manifest(folder), "no adapterhub.json", "pull"),
    Case("signature of nobody", beside("adapterhub.sig.json", b"{}"), "not a signature file", "pull"),
]


def _nan_metric(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    metric = '[{"metric": "m", "adapter_value": NaN, "base_value": null, "data": "d"}]'
    put(folder / MANIFEST, text.replace('"evaluation": []', f'"evaluation": {metric}').encode())


def _linked_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "elsewhere.json")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere.json")
