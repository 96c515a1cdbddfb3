"""Any source of an adapter becomes a folder with PEFT's two files, and what was done on the way is said.

A folder, a checkpoint, a run folder, a zip or tar, an adapter of MLX or llama.cpp: whichever it is, what comes out is
examined like every other folder; nothing is trusted for having been converted here.

Tensor names that PEFT's own loader would not know are renamed, and frozen copies of the base dropped, on the bytes of
the file: only its header is written anew, and no tensor is loaded but to compare a copy with the base. What cannot be
understood without guessing is refused by the name of its writer.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.added_tokens import (
    ADDED_TOKENS_FILE,
    MAX_TOKENIZER_BYTES,
    TOKENIZER_FILE,
)
from adapterhub_lite.adapter_format.binding import some
from adapterhub_lite.adapter_format.changes import PREFIX, is_saved, module_and_part
from adapterhub_lite.adapter_format.folder import ALLOWED_SIZES, PICKLED_WEIGHTS
from adapterhub_lite.adapter_format.foreign.archives import is_archive, unpack
from adapterhub_lite.adapter_format.foreign.child import convert_in_child
from adapterhub_lite.adapter_format.foreign.mlx import MLX_WEIGHTS, convert_mlx, is_mlx
from adapterhub_lite.adapter_format.foreign.new_rows import own_rows, take_new_rows
from adapterhub_lite.adapter_format.lora_config import MAX_CONFIG_BYTES, read_lora_config
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, RECORD_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.probes import PROBES_FILE
from adapterhub_lite.adapter_format.strict_reading import (
    TensorEntry,
    read_tensor_entries,
    strict_json,
    write_tensors,
)
from adapterhub_lite.errors import AdapterRejectedError

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


# Names that wrappers put into a path: torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# `lora_A.default.weight`: the name that the adapter had in the model it was saved from.
ADAPTER_NAME = re.compile(r"(.*\.lora_(?:A|B))\.([A-Za-z0-9_-]+)\.(weight|bias)")
MAGNITUDE = re.compile(r"(.*\.lora_magnitude_vector)(?:\.([A-Za-z0-9_-]+?))??(?:\.weight)?")
COPY = re.compile(
    re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+?)"
    r"(?P<frozen>\.token_adapter\.base_layer|\.base_layer|\.original_module)?(?P<trained>\.modules_to_save(?:\.\w+)?)?"
    r"\.(?P<part>weight|bias)"
)
# What the tensors of other kinds of adapters are called, and whose they are.
FOREIGN = (
    (re.compile(r"lora_(unet|te\d?|transformer|prior)_"), "Kohya's format for diffusion models"),
    (re.compile(r"(unet|text_encoder(_\d)?|vae|diffusion_model|transformer\.(single_)?transformer_blocks)\."),
     "a LoRA of diffusers, for a diffusion model"),
    (re.compile(r".*\.lora(_linear_layer)?\.(up|down)\.weight"), "a LoRA of diffusers, for a diffusion model"),
    (re.compile(r".*\.lora_(up|down)\.weight|.*\.hada_w\d|.*\.lokr_w"), "LyCORIS or Kohya's format for diffusion models"),
    (re.compile(r".*\.(lora_[ab]|m)$"), "MLX's names"),
    (re.compile(r"(.*\.)?prompt_embeddings|.*\.ia3_l|.*\.oft_|.*\.lokr_|.*\.loha_"), "another method than LoRA"),
)  # fmt: skip


@dataclass
class Renaming:
    """How a weights file becomes PEFT's: old name -> new name, and which tensors are copies of the base's.

    Of those in `rows` (old name -> n), the first n rows are such a copy, and those behind are of new tokens.
    """

    names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, tuple[str, str]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def changes_nothing(self) -> bool:
        """Whether the file is as PEFT writes it."""
        return not self.copies and all(old == new for old, new in self.names.items())


def plan_renaming(subject: str, entries: Iterable[TensorEntry]) -> Renaming:
    """Find PEFT's names for the tensors of an adapter.

    Raises:
        AdapterRejectedError: the names are those of another kind of adapter, or of several adapters.
    """
    found = Renaming()
    adapters: set[str] = set()
    kept: dict[tuple[str, str], tuple[int, str]] = {}
    unwrapped, prefixed = [], []
    for entry in entries:
        name = ".".join(part for part in entry.name.split(".") if part not in WRAPPERS).removeprefix("module.")
        if name != entry.name:
            unwrapped.append(entry.name)
        if module_and_part(name) is None:
            _refuse_foreign(subject, name)
        for pattern in (ADAPTER_NAME, MAGNITUDE):
            match = pattern.fullmatch(name)
            if match and match[2]:
                adapters.add(match[2])
            if match:
                name = f"{match[1]}.{match[3]}" if pattern is ADAPTER_NAME else match[1]
        if not name.startswith(PREFIX) and module_and_part(PREFIX + name):
            prefixed.append(name)
            name = PREFIX + name
        copy = COPY.fullmatch(name)
        if copy and not module_and_part(name):
            # PEFT may write one three times: as it is used, as it was trained, and as it was before.
            where, order = (copy["module"], copy["part"]), 2 if copy["frozen"] else 1 if copy["trained"] else 0
            kept[where] = min(kept.get(where, (order, entry.name)), (order, entry.name))
        else:
            found.names[entry.name] = name
    found.copies = {name: where for where, (_, name) in kept.items()}
    if len(adapters) > 1:
        raise AdapterRejectedError(subject, [f"its weights hold several adapters: {some(sorted(adapters))}"])
    if len(set(found.names.values())) < len(found.names):
        raise AdapterRejectedError(subject, ["two of its tensors have one name once wrappers are taken off"])
    if adapters:
        found.notes.append(f"the adapter's own name {adapters.pop()!r} was taken out of its tensor names")
    if unwrapped:
        found.notes.append(f"what wraps a model was taken out of {len(unwrapped)} tensor names ({some(unwrapped)})")
    if prefixed:
        found.notes.append(f"{len(prefixed)} tensor names lacked PEFT's prefix, which its own loader would not find")
    return found


def _refuse_foreign(subject: str, name: str) -> None:
    for pattern, writer in FOREIGN:
        if pattern.match(name.removeprefix(PREFIX)):
            raise AdapterRejectedError(
                subject, [f"its tensors ({name:.80}) are {writer}; only LoRA as PEFT means it is taken"]
            )


def rewrite(
    subject: str, source: Path, target: Path, plan: Renaming, base: Path | None, saved: Sequence[str]
) -> list[str]:
    """Write the weights at `source` under PEFT's names to `target`, without the copies of the base's own tensors.

    Modules that the configuration says are `saved` stay where one of them was trained. Returns what to say of it.

    Raises:
        AdapterRejectedError: a copy differs from the base in folder `base`, or there is no base to compare it with.
    """
    notes = list(plan.notes)
    if plan.copies:
        changed = sorted(name for name, where in plan.copies.items() if not _same_as_base(source, name, where, base))
        if any(is_saved(".".join((PREFIX[:-1], *plan.copies[name])), saved) for name in changed):
            kept = {n: ".".join((PREFIX[:-1], *where)) for n, where in plan.copies.items()}
            plan.names |= {n: name for n, name in kept.items() if is_saved(name, saved)}
            plan.copies = {n: where for n, where in plan.copies.items() if n not in plan.names}
            changed = [name for name in changed if name in plan.copies]
        if changed:
            known = "differ from the base's own" if base else "cannot be compared without the base"
            raise AdapterRejectedError(
                subject,
                [
                    f"it holds whole tensors of the base that {known} ({some(changed)}), and its configuration does not say "
                    "that they are part of it (modules_to_save)"
                ],
            )
    if plan.copies:
        notes.append(
            f"{len(plan.copies)} unchanged copies of the base's own tensors were dropped ({some(sorted(plan.copies))})"
        )
    write_tensors(source, target, plan.names, plan.rows)
    return notes


def _same_as_base(source: Path, name: str, where: tuple[str, str], base: Path | None) -> bool:
    """Whether a tensor of the adapter is the base's own, rounded to the adapter's dtype."""
    return own_rows(source, name, where, base, longer=False) is not None


GGUF_MAGIC = b"GGUF"
MAX_FOREIGN_BYTES = 4 << 30
ARCHIVED_SIZES = {
    **ALLOWED_SIZES,
    MLX_WEIGHTS: MAX_FOREIGN_BYTES,
    PICKLED_WEIGHTS: MAX_FOREIGN_BYTES,
    TOKENIZER_FILE: MAX_TOKENIZER_BYTES,
}


@dataclass
class Opened:
    """A folder with an adapter in it, what was done to get there, and what was left alone on the way."""

    folder: Path
    said: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)


def open_adapter(source: Path, scratch: Path, *, base: Path | None = None, convert: bool = False) -> Opened:
    """Find the adapter in `source`, and write it into the empty folder `scratch` where it is not plain PEFT yet.

    `base` is the folder of its base, which some conversions need. Pickled weights are converted only with `convert`.

    Raises:
        AdapterRejectedError: there is none, there are several, or it is of a kind that is not taken.
    """
    opened = Opened(source)
    subject = f"The adapter in {source.name!r:.100}"
    if not source.is_dir() and is_archive(source):
        opened.folder = scratch / "unpacked"
        inside, opened.left_alone = unpack(source, opened.folder, ARCHIVED_SIZES)
        opened.said.append(f"unpacked {inside or 'its top folder'} of {source.name}")
    elif source.is_dir() and not source.is_symlink() and not (source / CONFIG_FILE).exists():
        of_run = adapter_of_run(source)
        if of_run is not None:
            opened.folder, why = of_run
            opened.said.append(f"took {why}")
    if gguf := _gguf(opened.folder):
        return _converted(opened, scratch, "gguf", gguf, subject, base)
    if not opened.folder.is_dir():
        raise AdapterRejectedError(subject, ["it is no folder, no zip or tar archive and no GGUF adapter"])
    if not (opened.folder / WEIGHTS_FILE).exists() and is_mlx(opened.folder):
        target = scratch / "mlx"
        opened.said.append(convert_mlx(subject, opened.folder, target))
        opened.folder = target
    elif _plain(opened.folder / PICKLED_WEIGHTS) and not (opened.folder / WEIGHTS_FILE).exists():
        if not convert:
            why = f"{PICKLED_WEIGHTS} is a pickle, which may execute code when it is loaded"
            raise AdapterRejectedError(
                subject, [f"{why}; {WEIGHTS_FILE} is missing. Convert it in a closed process: convert=True (--convert)"]
            )
        opened = _converted(opened, scratch, "pickle", opened.folder / PICKLED_WEIGHTS, subject, base)
    _rename(opened, scratch, subject, base)
    return opened


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _gguf(source: Path) -> Path | None:
    """The GGUF file that `source` is, or the only one in a folder without another adapter."""
    if source.is_dir() and not (source / CONFIG_FILE).exists():
        found = [path for path in source.glob("*.gguf") if _plain(path)]
        source = found[0] if len(found) == 1 else source
    if not _plain(source):
        return None
    with source.open("rb") as file:
        return source if file.read(4) == GGUF_MAGIC else None


def _converted(opened: Opened, scratch: Path, kind: str, file: Path, subject: str, base: Path | None) -> Opened:
    if file.stat().st_size > MAX_FOREIGN_BYTES:
        raise AdapterRejectedError(subject, [f"{file.name:.80} has more than {MAX_FOREIGN_BYTES} bytes"])
    target = scratch / kind
    target.mkdir()
    more: list[str] = []
    if kind == "gguf":
        if base is None:
            raise AdapterRejectedError(subject, ["a GGUF adapter is converted for its base: give base= (--base)"])
        more = [str(target / CONFIG_FILE), str(base)]
    else:
        carry(opened.folder, target)
    opened.said.append(convert_in_child(subject, kind, file, target / WEIGHTS_FILE, *more))
    return Opened(target, opened.said, opened.left_alone)


def carry(folder: Path, target: Path) -> None:
    """Copy the small files of an adapter; what is no plain file or too large is left to the survey of the original."""
    for name in (CONFIG_FILE, PROBES_FILE, RECORD_FILE, TEMPLATE_FILE, ADDED_TOKENS_FILE):
        path = folder / name
        if _plain(path) and path.stat().st_size <= ALLOWED_SIZES[name]:
            (target / name).write_bytes(path.read_bytes())


def _rename(opened: Opened, scratch: Path, subject: str, base: Path | None) -> None:
    """Give the tensors PEFT's names where they have others; a file that cannot be read is left to the inspection."""
    weights = opened.folder / WEIGHTS_FILE
    if not _plain(weights):
        return
    try:
        entries = read_tensor_entries(weights)
    except (OSError, ValueError):
        return
    plan = plan_renaming(subject, entries)
    if plan.changes_nothing:
        return
    target = scratch / "renamed"
    target.mkdir()
    carry(opened.folder, target)
    if plan.copies:
        _take_new_rows(opened, weights, target / CONFIG_FILE, plan, base)
    saved = _saved_modules(target / CONFIG_FILE)
    copies = bool(plan.copies)
    opened.said += rewrite(subject, weights, target / WEIGHTS_FILE, plan, base, saved)
    if copies and not any(is_saved(name, saved) for name in plan.names.values()):
        _without_saved_modules(target / CONFIG_FILE)
    opened.folder = target


def may_bring_tokens(folder: Path) -> bool:
    """Whether the adapter in a folder says that it has rows for tokens, or whole tensors of the base that may have new ones."""
    try:
        settings = read_lora_config((folder / CONFIG_FILE).read_bytes())
        plan = plan_renaming("", read_tensor_entries(folder / WEIGHTS_FILE))
    except (OSError, ValueError, AdapterRejectedError):
        return False
    return bool(settings.trainable_token_indices or settings.modules_to_save or plan.copies)


def _take_new_rows(opened: Opened, weights: Path, config: Path, plan: Renaming, base: Path | None) -> None:
    """Of embeddings that were resized, keep the rows of new tokens; what is wrong is said by the inspection."""
    try:
        settings = read_lora_config(config.read_bytes())
        found = strict_json(config.read_bytes(), what=CONFIG_FILE, limit=MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return
    where = dict(plan.copies)
    plan.rows, changes = take_new_rows(
        weights, plan.names, plan.copies, settings,
        lambda name: own_rows(weights, name, where[name], base, longer=True),
    )  # fmt: skip
    if changes:
        config.write_text(json.dumps(found | changes))
    if plan.rows:
        opened.said.append(f"of {len(plan.rows)} resized tensors the rows that the base has not were kept")


def _saved_modules(path: Path) -> tuple[str, ...]:
    """The modules that a configuration says were trained whole; what is wrong with it is said by the inspection."""
    try:
        return read_lora_config(path.read_bytes()).saved_modules
    except (OSError, ValueError):
        return ()


def _without_saved_modules(path: Path) -> None:
    """Take `modules_to_save` out of a configuration whose saved modules were all the base's own."""
    try:
        found: dict[str, Any] = strict_json(path.read_bytes(), what=CONFIG_FILE, limit=MAX_CONFIG_BYTES)
    except (OSError, ValueError):
        return
    found["modules_to_save"] = None
    path.write_text(json.dumps(found))
