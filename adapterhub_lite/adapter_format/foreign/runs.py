"""A folder that a training run left: which of its checkpoints holds the adapter to take."""

import json
import re
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import CONFIG_FILE

CHECKPOINT = re.compile(r"checkpoint-(\d{1,9})")
STATE_FILE = "trainer_state.json"
MAX_STATE_BYTES = 32 << 20
# Where runs put the adapter that they ended with.
FINAL_FOLDERS = ("adapter", "final", "final_checkpoint")
MAX_ENTRIES = 2000


def adapter_of_run(folder: Path) -> tuple[Path, str] | None:
    """The adapter that the run in `folder` left, and why that one; None where no part of it holds an adapter.

    What the run ended with goes before its best checkpoint, and that before its newest.
    """
    for name in FINAL_FOLDERS:
        if _holds_adapter(folder / name):
            return folder / name, f"what the run ended with, {name}"
    numbers = sorted(
        int(match[1])
        for count, entry in enumerate(folder.iterdir())
        if count < MAX_ENTRIES and (match := CHECKPOINT.fullmatch(entry.name)) and _holds_adapter(entry)
    )
    if not numbers:
        return None
    newest = folder / f"checkpoint-{numbers[-1]}"
    best = _best(newest / STATE_FILE)
    if best is not None and _holds_adapter(folder / best):
        return folder / best, f"the best checkpoint of the run, {best}"
    return newest, f"the newest checkpoint of the run, {newest.name}"


def _holds_adapter(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (folder / CONFIG_FILE).is_file()


def _best(state: Path) -> str | None:
    """The name of the best checkpoint, as the newest one says; a path in it is not followed."""
    if not state.is_file() or state.is_symlink() or state.stat().st_size > MAX_STATE_BYTES:
        return None
    try:
        # Not strict: the Trainer writes a loss of NaN, and only one text of the file is used.
        state_of_run = json.loads(state.read_bytes())
    except (ValueError, RecursionError):
        return None
    found = state_of_run.get("best_model_checkpoint") if isinstance(state_of_run, dict) else None
    name = re.split(r"[/\\]", found)[-1] if isinstance(found, str) else ""
    return name if CHECKPOINT.fullmatch(name) else None
