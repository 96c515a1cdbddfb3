"""A first look at an adapter folder from anywhere: names, kinds and sizes only; no file is opened but the card."""

import os
import re
import stat
from pathlib import Path

from adapterhub_lite.adapter_format.lora_config import MAX_CONFIG_BYTES
from adapterhub_lite.adapter_format.manifest import (
    ALIASES_FILE,
    CARD_FILE,
    CONFIG_FILE,
    LOSS_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    PROBES_FILE,
    SIGNATURE_FILE,
    WEIGHTS_FILE,
)
from adapterhub_lite.adapter_format.record import RECORD_FILE

MAX_CARD_BYTES = 256 << 10
# What may be there, with the most bytes of each. A merge of many large adapters is the largest thing we make.
ALLOWED_SIZES = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: 4 << 30,
    PROBES_FILE: 4 << 20,
    MANIFEST_FILE: MAX_MANIFEST_BYTES,
    SIGNATURE_FILE: 16 << 10,
    RECORD_FILE: 1 << 20,
    CARD_FILE: MAX_CARD_BYTES,
}
ALLOWED_FILES = frozenset(ALLOWED_SIZES)
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# What lies beside an adapter in a copy of its repository; not looked into and not kept.
IGNORED_ENTRIES = frozenset({".gitattributes", ".cache", ALIASES_FILE, LOSS_FILE})
EXECUTABLE_SUFFIXES = {
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5", ".keras",
    ".py", ".pyc", ".so", ".sh", ".dll", ".exe", ".ipynb",
}  # fmt: skip
MAX_ENTRIES = 200
SHOWN = 20
ACTIVE_HTML = re.compile(
    r"<[ \t]*(?:script|iframe|object|embed|form|meta|link|svg|style|base|video|audio|img[^>]{0,200}\bon)\b"
    r"|javascript:|<[a-z][^>]{0,500}[\s/\"']on[a-z]{3,20}[ \t]*=",
    re.IGNORECASE,
)


def survey_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Look at the entries of `folder`: the allowed files that may be opened, and what is wrong with it."""
    if folder.is_symlink() or not folder.is_dir():
        return [], [f"{folder.name!r:.80} is not a folder"]
    usable: list[str] = []
    problems: list[str] = []
    crowd: list[str] = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_ENTRIES:
                crowd = [f"the folder has more than {MAX_ENTRIES} entries"]
                break
            if entry.name in IGNORED_ENTRIES:
                continue
            problem = _entry_problem(entry)
            if problem:
                problems.append(problem)
            else:
                usable.append(entry.name)
    problems = (
        crowd + sorted(problems)[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
    )
    problems += [f"{name} is missing" for name in REQUIRED_FILES if not (folder / name).exists()]
    return usable, problems


def card_problems(content: bytes) -> list[str]:
    """What is wrong with a model card: it must be text, and hold no HTML that acts."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return [f"{CARD_FILE} is not UTF-8 text"]
    found = ACTIVE_HTML.search(text)
    return [f"{CARD_FILE} holds HTML that acts: {found[0][:60]!r}"] if found else []


def _entry_problem(entry: os.DirEntry[str]) -> str | None:
    shown = ascii(entry.name)[:100]
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return f"{shown} is a symbolic link; only plain files are taken"
    if Path(entry.name).suffix.lower() in EXECUTABLE_SUFFIXES:
        return f"{shown} may execute code when loaded; only safetensors are taken"
    if not stat.S_ISREG(status.st_mode):
        return f"{shown} is not a plain file"
    if entry.name not in ALLOWED_FILES:
        return f"{shown} does not belong to an adapter; wanted only {', '.join(sorted(ALLOWED_FILES))}"
    if status.st_size > ALLOWED_SIZES[entry.name]:
        return f"{shown} has {status.st_size} bytes, at most {ALLOWED_SIZES[entry.name]} are taken"
    return None
