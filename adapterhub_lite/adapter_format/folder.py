"""An adapter folder from anywhere: a first look at its entries, then every part examined, all problems in one report.

The first look opens nothing. Then headers are read before tensors, and tensors a block at a time. What does not belong
to an adapter is left alone: never opened, copied or loaded.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_lite.adapter_format.added_tokens import (
    ADDED_TOKENS_FILE,
    MAX_ADDED_BYTES,
    AddedTokens,
    read_added_tokens,
)
from adapterhub_lite.adapter_format.binding import Modules, beyond_files, bind, some
from adapterhub_lite.adapter_format.changes import Structure
from adapterhub_lite.adapter_format.lora_config import (
    MAX_CONFIG_BYTES,
    ConfigProblems,
    LoraConfigFile,
    examine_lora_config,
)
from adapterhub_lite.adapter_format.manifest import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MAX_TEMPLATE_BYTES,
    RECORD_FILE,
    SIGNATURE_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    LoraRecord,
    TrainingRecord,
    read_record,
)
from adapterhub_lite.adapter_format.probes import PROBES_FILE, probes_problems
from adapterhub_lite.adapter_format.strict_reading import nonfinite_tensors, read_tensor_entries
from adapterhub_lite.errors import AdapterRejectedError, DataError

MAX_CARD_BYTES = 256 << 10
# What belongs to an adapter, with the most bytes of each. A merge of many large adapters is the largest thing we make.
ALLOWED_SIZES = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: 4 << 30,
    PROBES_FILE: 4 << 20,
    MANIFEST_FILE: MAX_MANIFEST_BYTES,
    SIGNATURE_FILE: 16 << 10,
    RECORD_FILE: 1 << 20,
    CARD_FILE: MAX_CARD_BYTES,
    TEMPLATE_FILE: MAX_TEMPLATE_BYTES,
    ADDED_TOKENS_FILE: MAX_ADDED_BYTES,
}
ALLOWED_FILES = frozenset(ALLOWED_SIZES)
REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)
PICKLED_WEIGHTS = "adapter_model.bin"
SHARD = re.compile(r"adapter_model-\d{1,6}-of-\d{1,6}\.safetensors")
MAX_ENTRIES = 200
ACTIVE_HTML = re.compile(
    r"<[ \t]*(?:script|iframe|object|embed|form|meta|link|svg|style|base|video|audio|img[^>]{0,200}\bon)\b"
    r"|javascript:|<[a-z][^>]{0,500}[\s/\"']on[a-z]{3,20}[ \t]*=",
    re.IGNORECASE,
)


@dataclass
class Survey:
    """The entries of a folder: `usable` may be opened, `left_alone` does not belong to an adapter."""

    usable: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def survey_folder(folder: Path) -> Survey:
    """Look at names, kinds and sizes in `folder`; no file is opened and no link followed."""
    found = Survey()
    if folder.is_symlink() or not folder.is_dir():
        found.problems.append(f"{folder.name!r:.80} is not a folder")
        return found
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_ENTRIES:
                found.problems.insert(0, f"the folder has more than {MAX_ENTRIES} entries")
                break
            if entry.name not in ALLOWED_SIZES:
                found.left_alone.append(ascii(entry.name)[1:-1][:100])
                continue
            problem = _entry_problem(entry)
            if problem:
                found.problems.append(problem)
            else:
                found.usable.append(entry.name)
    found.left_alone.sort()
    for name in REQUIRED_FILES:
        if not (folder / name).exists():
            found.problems.append(f"{name} is missing{_instead(found.left_alone) if name == WEIGHTS_FILE else ''}")
    return found


def _instead(left_alone: list[str]) -> str:
    """What lies there in place of the weights, and what to do about it."""
    if PICKLED_WEIGHTS in left_alone:
        return f", and {PICKLED_WEIGHTS}, which may execute code, is not opened"
    if any(SHARD.fullmatch(name) for name in left_alone):
        return (
            "; its weights are in several files. Load the adapter with PEFT and save it again, which writes one "
            "(save_pretrained, max_shard_size is for bases)"
        )
    return ""


def _entry_problem(entry: os.DirEntry[str]) -> str | None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return f"{entry.name} is a symbolic link; only plain files are taken"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.name} is not a plain file"
    if status.st_size > ALLOWED_SIZES[entry.name]:
        return f"{entry.name} has {status.st_size} bytes, at most {ALLOWED_SIZES[entry.name]} are taken"
    return None


@dataclass
class Inspection:
    """What was found in an adapter folder. With `problems` empty, `config` and `lora` are there.

    `config` holds no patterns any more; `rows` are those of tokens, of the base and the adapter's own, where that is
    known, and `added` the texts of its own. `notes` say what was dropped, `left_alone` which entries were not opened.
    """

    subject: str
    problems: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: LoraConfigFile | None = None
    lora: LoraRecord | None = None
    training: TrainingRecord | None = None
    rows: int | None = None
    added: AddedTokens | None = None
    brings_tokens: bool = False

    def accepted(self) -> tuple[LoraConfigFile, LoraRecord]:
        """The configuration and the record of an adapter without problems.

        Raises:
            AdapterRejectedError: with every problem found.
        """
        if self.problems or self.config is None or self.lora is None:
            raise AdapterRejectedError(self.subject, self.problems)
        return self.config, self.lora


def inspect_folder(
    folder: Path,
    modules: Modules | None = None,
    subject: str | None = None,
    structure: Callable[[], Structure] | None = None,
) -> Inspection:
    """Examine the adapter in `folder`. With `modules` (name -> shape), every tensor has to bind to one of them.

    `structure` is asked for all that the base consists of where the names in its files do not say what fits.

    Never raises for what the folder holds.
    """
    survey = survey_folder(folder)
    found = Inspection(subject or f"The adapter in {folder.name!r:.100}", survey.problems, survey.usable)
    found.left_alone = survey.left_alone
    if CONFIG_FILE in found.usable:
        try:
            reading = examine_lora_config((folder / CONFIG_FILE).read_bytes())
            found.config, found.notes = reading.config, list(reading.notes)
        except ConfigProblems as error:
            found.problems += error.problems
    if CARD_FILE in found.usable:
        found.problems += card_problems((folder / CARD_FILE).read_bytes())
    if RECORD_FILE in found.usable:
        try:
            found.training = read_record(folder)
        except DataError as error:
            found.problems.append(str(error).replace(str(folder), ""))
    if WEIGHTS_FILE in found.usable:
        _inspect_weights(found, folder / WEIGHTS_FILE, modules, structure)
    if ADDED_TOKENS_FILE in found.usable:
        _inspect_tokens(found, folder / ADDED_TOKENS_FILE)
    elif found.brings_tokens:
        found.notes.append(
            "its new tokens have no texts here, so a prompt has them by their numbers alone; save the tokenizer into its "
            "folder, as tokenizer.json"
        )
    if TEMPLATE_FILE in found.usable and found.training is not None:
        digest = hashlib.sha256((folder / TEMPLATE_FILE).read_bytes()).hexdigest()
        if digest != found.training.template_digest:
            found.problems.append(f"{TEMPLATE_FILE} is not the chat template that its training record names")
    if PROBES_FILE in found.usable:
        found.problems += probes_problems(folder / PROBES_FILE)
    return found


def _inspect_tokens(found: Inspection, path: Path) -> None:
    try:
        found.added = read_added_tokens(path.read_bytes())
    except ValueError as error:
        found.problems.append(str(error))
        return
    last = found.added.tokens[-1]
    if found.rows is not None and last.id >= found.rows:
        found.problems.append(
            f"its token {last.content!r:.80} has the number {last.id}, and base and adapter have {found.rows} rows together"
        )


def card_problems(content: bytes) -> list[str]:
    """What is wrong with a model card: it must be text, and hold no HTML that acts."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return [f"{CARD_FILE} is not UTF-8 text"]
    found = ACTIVE_HTML.search(text)
    return [f"{CARD_FILE} holds HTML that acts: {found[0][:60]!r}"] if found else []


def _inspect_weights(
    found: Inspection, path: Path, modules: Modules | None, structure: Callable[[], Structure] | None
) -> None:
    try:
        entries = read_tensor_entries(path)
    except ValueError as error:
        found.problems.append(str(error))
        return
    if found.config is not None:
        whole = None
        if structure and modules and beyond_files(found.config, entries, modules):
            try:
                whole = structure()
            except ModuleNotFoundError:
                # Without torch, what its files say of the base has to do, and where it cannot, that is said.
                if found.config.beyond_pairs:
                    raise
        binding = bind(found.config, entries, modules, whole)
        found.config, found.lora = binding.config, binding.lora
        found.problems += binding.problems
        found.notes += binding.notes
        found.rows, found.brings_tokens = binding.rows, binding.brings_tokens
    broken = list(nonfinite_tensors(path, entries))
    if broken:
        found.problems.append(f"NaN or infinite values in {some(broken)}")
