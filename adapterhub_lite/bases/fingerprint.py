"""A base on this machine, and its fingerprint: one sha256 over what decides its answers. Standard library only.

Covered: the configuration (without keys that only say who wrote it), the tokenizer, the chat template, and every
tensor's name, dtype, shape and bytes. The order of tensors in a file, and how many files there are, do not matter.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import CONFIG_FILE
from adapterhub_lite.bases.broken import fetch_again, read_entries, read_object
from adapterhub_lite.bases.chat.template import TEMPLATE_FILE
from adapterhub_lite.errors import BrokenBaseError, UsageError
from adapterhub_lite.files import settled_stamps

# Written by the library that saved the folder; they change with its version, not with the model.
VOLATILE_CONFIG_KEYS = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path", "use_cache"})
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", TEMPLATE_FILE)
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Fingerprint:
    """The sha256 of a whole base and of its parts: `config`, `tokenizer`, `template`, `weights`."""

    whole: str
    parts: dict[str, str]


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine. `model_id` is what a card names; `revision` is a 40-hex commit or None."""

    name: str
    model_id: str
    folder: Path
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        """The sha256 over configuration, tokenizer, chat template and weights."""
        return base_fingerprint(self.folder)

    @property
    def parts(self) -> dict[str, str]:
        """The sha256 of each part that the fingerprint covers."""
        return read_fingerprint(self.folder).parts


def is_commit(revision: str | None) -> bool:
    """Whether `revision` may pin a base: a 40-hex commit, or None for a local or embedded one."""
    return revision is None or COMMIT.fullmatch(revision) is not None


def base_fingerprint(folder: str | Path) -> str:
    """Return the sha256 (64 hex digits) of the base in `folder`; raises as `read_fingerprint` does."""
    return read_fingerprint(folder).whole


def read_fingerprint(folder: str | Path) -> Fingerprint:
    """Return the fingerprint of the base in `folder` and of its parts, which show how two bases differ.

    The result is cached in `<folder>/.fingerprint.json`, keyed by the size, inode and times of change of every file; a
    folder that is not writable is simply read again.

    Raises:
        UsageError: there is no `config.json` or no `.safetensors` file in `folder`.
        BrokenBaseError: one of them is damaged, or an adapter lies beside them.
    """
    root = Path(folder)
    weights = sorted(root.glob("*.safetensors"))
    if not (root / "config.json").is_file() or not weights:
        raise UsageError(
            f"{root} is not a base model: expected config.json and .safetensors weights in it. "
            "Give a folder written by save_pretrained."
        )
    check_alone(root)
    names = ["config.json", *TOKENIZER_FILES, *(path.name for path in weights)]
    files = [root / name for name in names if (root / name).is_file()]
    stamps = settled_stamps(files)
    if stamps is None:
        return compute_fingerprint(root, weights)
    stamp = {path.name: list(stamp) for path, stamp in zip(files, stamps, strict=True)}
    remembered = _read_memo(root, stamp)
    if remembered is not None:
        return remembered
    fingerprint = compute_fingerprint(root, weights)
    _write_memo(root, stamp, fingerprint)
    return fingerprint


def check_alone(folder: Path) -> None:
    """Refuse a base that lies beside an adapter: transformers would put it on the base, whichever base it names.

    Raises:
        BrokenBaseError: there is one in its folder.
    """
    if (folder / CONFIG_FILE).is_file():
        raise BrokenBaseError(
            f"{folder} holds an adapter ({CONFIG_FILE}) beside a base, and transformers would put it on. Move the adapter's files "
            "to a folder of their own, or merge it into the base."
        )


def compute_fingerprint(root: Path, weights: list[Path]) -> Fingerprint:
    """Read every covered file of `root` and digest it."""
    config = read_object(root / "config.json")
    kept = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    config_digest = {"config": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}
    present = [name for name in TOKENIZER_FILES if (root / name).is_file()]
    files = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in present}
    tensors: dict[str, str] = {}
    for path in weights:
        tensors.update(tensor_digests(path))
    template = {name: files[name] for name in files if name == TEMPLATE_FILE}
    tokenizer = {name: files[name] for name in files if name != TEMPLATE_FILE}
    parts = {"config": config_digest, "tokenizer": tokenizer, "template": template, "weights": tensors}
    whole = _digest_of(config_digest | files | tensors)
    return Fingerprint(whole, {name: _digest_of(digests) for name, digests in parts.items()})


def _digest_of(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def tensor_digests(path: Path) -> dict[str, str]:
    """Digest each tensor of a safetensors file under the key `tensor:<name>:<dtype>:<shape>`."""
    digests: dict[str, str] = {}
    entries = read_entries(path)
    with path.open("rb") as file:
        for entry in entries:
            file.seek(entry.start)
            digest = hashlib.sha256()
            remaining = entry.end - entry.start
            while remaining > 0:
                block = file.read(min(BLOCK_BYTES, remaining))
                if not block:
                    raise BrokenBaseError(f"{path} became shorter while it was read. {fetch_again(path.parent)}")
                digest.update(block)
                remaining -= len(block)
            digests[f"tensor:{entry.name}:{entry.dtype}:{list(entry.shape)}"] = digest.hexdigest()
    return digests


def _read_memo(root: Path, stamp: dict[str, list[int]]) -> Fingerprint | None:
    try:
        memo = json.loads((root / ".fingerprint.json").read_bytes())
    except (OSError, ValueError):
        return None
    known = isinstance(memo, dict) and memo.get("files") == stamp and "parts" in memo
    return Fingerprint(memo["fingerprint"], memo["parts"]) if known else None


def _write_memo(root: Path, stamp: dict[str, list[int]], found: Fingerprint) -> None:
    target = root / ".fingerprint.json"
    aside = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps({"files": stamp, "fingerprint": found.whole, "parts": found.parts}))
        aside.replace(target)
    except OSError:
        aside.unlink(missing_ok=True)
