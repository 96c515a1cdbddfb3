"""Whether an adapter is for a base: its modules that hold a matrix, its tokens, and what it is called.

From headers; no torch. Tokens of an adapter's own are tried out with the base's tokenizer, for which transformers has to be
there: what only keeps adapters has none, and that is said.
"""

import re
import shutil
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from adapterhub_lite.adapter_format.added_tokens import (
    ADDED_TOKENS_FILE,
    TOKENIZER_FILE,
    AddedTokens,
    added_tokens_of,
    tokenizer_with,
)
from adapterhub_lite.adapter_format.binding import Modules
from adapterhub_lite.adapter_format.folder import Inspection, inspect_folder
from adapterhub_lite.adapter_format.foreign.opening import Opened, carry, may_bring_tokens
from adapterhub_lite.adapter_format.lora_config import read_lora_config
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.strict_reading import MAX_BASE_HEADER_BYTES, read_tensor_entries
from adapterhub_lite.bases.chat.bounded import can_lay_out, template_problem
from adapterhub_lite.bases.fingerprint import ResolvedBase, is_commit
from adapterhub_lite.bases.load import load_tokenizer
from adapterhub_lite.bases.resolve import HUB_ID
from adapterhub_lite.bases.structure import structure_in
from adapterhub_lite.errors import BaseMismatchError
from adapterhub_lite.files import FileStamp, settled_stamps


def inspect_adapter(folder: Path, *, base: ResolvedBase | None = None, subject: str | None = None) -> Inspection:
    """Examine the adapter in `folder`. With `base`, every tensor has to bind to one of its modules.

    Never raises for what the folder holds.
    """
    if base is None:
        found = inspect_folder(folder, None, subject)
    else:
        found = inspect_folder(folder, base_modules(base.folder), subject, partial(structure_in, base.folder))
    if found.added is not None and base is not None and has_tokenizers():
        wrong = token_problem(found.added, base.folder)
        found.problems += [wrong] if wrong else []
    if TEMPLATE_FILE in found.usable and not can_lay_out():
        found.notes.append(f"{TEMPLATE_FILE} was not tried out here: it is when the adapter is asked with a chat")
    elif TEMPLATE_FILE in found.usable:
        problem = template_problem((folder / TEMPLATE_FILE).read_bytes().decode("utf-8", "replace"))
        found.problems += [f"{TEMPLATE_FILE} lays out no chat: {problem}"] if problem else []
    return found


# What most families call the modules that have a row per token.
VOCABULARY = re.compile(r"(^|\.)(embed_tokens|wte|lm_head)$")


def has_tokenizers() -> bool:
    """Whether the tokenizer of a base can be loaded here."""
    return find_spec("transformers") is not None


def take_tokens(opened: Opened, source: Path, scratch: Path, base: Path) -> None:
    """Put the texts of new tokens beside an adapter that has rows for tokens, out of the tokenizer that lies there.

    `source` is what was opened, `scratch` the folder for copies, `base` that of the base.
    """
    places = [folder / TOKENIZER_FILE for folder in (opened.folder, source) if folder.is_dir()]
    tokenizer = next((path for path in places if path.is_file() and not path.is_symlink()), None)
    if tokenizer is None or (opened.folder / ADDED_TOKENS_FILE).exists() or not may_bring_tokens(opened.folder):
        return
    if not has_tokenizers():
        opened.said.append(f"{TOKENIZER_FILE} was not read for new tokens, for want of transformers")
        return
    try:
        added = added_tokens_of(tokenizer, frozenset(load_tokenizer(base).get_vocab()))
    except (OSError, ValueError) as error:
        opened.said.append(f"{TOKENIZER_FILE} was not read for new tokens: {error}")
        return
    # One that has no row was never seen in training: people add a padding token and do not resize.
    kept = tuple(token for token in added.tokens if token.id < _rows(opened.folder, base)) if added else ()
    if added is None or not kept:
        return
    added = AddedTokens(tokens=kept)
    if not opened.folder.is_relative_to(scratch):
        target = scratch / "with-tokens"
        target.mkdir()
        carry(opened.folder, target)
        shutil.copyfile(opened.folder / WEIGHTS_FILE, target / WEIGHTS_FILE)
        opened.folder = target
    (opened.folder / ADDED_TOKENS_FILE).write_bytes(added.to_bytes())
    opened.said.append(f"the texts of {len(added.tokens)} new tokens were taken out of {TOKENIZER_FILE}")


def _rows(adapter: Path, base: Path) -> int:
    """How many tokens a base and an adapter that was written here have rows for, at most."""
    own = [shape[0] for name, shape in base_modules(base).items() if VOCABULARY.search(name)]
    if not own:
        return 1 << 24  # it calls them otherwise
    entries = read_tensor_entries(adapter / WEIGHTS_FILE)
    saved = [entry.shape[0] for entry in entries if VOCABULARY.search(entry.name.removesuffix(".weight"))]
    given = read_lora_config((adapter / CONFIG_FILE).read_bytes()).trainable_token_indices or []
    listed = [given] if isinstance(given, list) else list(given.values())
    return max([*own, *saved, *(token + 1 for tokens in listed for token in tokens)])


def token_problem(added: AddedTokens, base: Path) -> str | None:
    """Why the tokenizer of the base in a folder does not take these tokens; None where it does."""
    try:
        tokenizer_with(added, load_tokenizer(base))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check_base(found: Inspection, base: ResolvedBase, *, differs: bool = False) -> str | None:
    """Hold an adapter against the base given for it; what its own configuration calls its base, where that is another.

    The fingerprint in its training record decides where there is one. Otherwise the name in its configuration is
    compared: another one is refused unless `differs` says that it is known, one that says nothing is noted.

    Raises:
        BaseMismatchError: it is for another base, and that is all that is wrong with it.
    """
    recorded = found.training.base if found.training else None
    for revision in {base.revision, recorded.revision if recorded else None}:
        if not is_commit(revision):
            found.problems.append(f"the base's revision {revision!r:.80} is not a 40-hex commit")
    if recorded is not None and recorded.fingerprint == base.fingerprint:
        return None
    if recorded is not None:
        _mismatch(found, f"it was {recorded.difference(base.model_id, base.fingerprint, base.parts)}")
        return None
    named = found.config.base_model_name_or_path if found.config else None
    relation = compare_names(named, base)
    if relation == "another" and not differs:
        _mismatch(
            found,
            f"its configuration names {named!r:.120}, not {base.model_id!r:.120}. Give that base, or say with "
            "base_differs=True (--base-differs) that the two are known to fit",
        )
    if relation == "unknown":
        what = f"calls it {named!r:.120}" if named else "does not name it"
        found.notes.append(f"whether {base.model_id!r:.120} is its base cannot be told: its configuration {what}")
    revision = found.config.revision if found.config else None
    if relation != "another" and is_commit(revision) and revision and base.revision not in (None, revision):
        found.notes.append(f"its configuration names the base at commit {revision}, given is {base.revision}")
    return None if relation == "same" else named


def _mismatch(found: Inspection, text: str) -> None:
    if not found.problems:
        raise BaseMismatchError(f"{found.subject} is for another base: {text}.")
    found.problems.append(text)


def compare_names(named: str | None, base: ResolvedBase) -> Literal["same", "unknown", "another"]:
    """How what an adapter calls its base relates to `base`: a path or a folder's own name tells nothing of a Hub id."""
    if not named:
        return "unknown"
    ours = {base.model_id, base.name, str(base.folder)}
    if named in ours or Path(named).expanduser() == base.folder:
        return "same"
    if not HUB_ID.fullmatch(named):
        return "same" if re.split(r"[/\\]", named.rstrip("/\\"))[-1] == base.model_id else "unknown"
    if _plain_name(named) in {_plain_name(name) for name in ours}:
        # A copy under another owner, or one that was quantised: likely, not certain.
        return "unknown"
    return "another" if HUB_ID.fullmatch(base.model_id) else "unknown"


def _plain_name(model_id: str) -> str:
    name = re.split(r"[/\\]", model_id)[-1].lower()
    return re.sub(r"(-unsloth)?-(bnb-[48]bit|gptq(-int[48])?|awq|gguf|[48]bit)$", "", name)


def base_modules(folder: Path) -> Modules:
    """The modules of the base in `folder` that hold a matrix: dotted name -> shape of its weight.

    A head that shares the embedding's weight is listed as `lm_head` though no file holds it.
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    stamps = settled_stamps(files)
    return _read_modules(files) if stamps is None else _known_modules(files, stamps)


@lru_cache(maxsize=8)
def _known_modules(files: tuple[Path, ...], stamps: tuple[FileStamp, ...]) -> Modules:
    return _read_modules(files)


def _read_modules(files: Sequence[Path]) -> Modules:
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES):
            if entry.name.endswith(".weight") and len(entry.shape) == 2:
                found[entry.name.removesuffix(".weight")] = entry.shape
    embedding = next((shape for name, shape in found.items() if re.search(r"(^|\.)(embed_tokens|wte)$", name)), None)
    if embedding and not any(name.endswith("lm_head") for name in found):
        found["lm_head"] = embedding
    return found


def stored_modules(folder: Path) -> frozenset[str]:
    """The modules of the base in `folder` whose weight is in a file of its own: a tied head is not among them."""
    return frozenset(
        entry.name.removesuffix(".weight")
        for path in folder.glob("*.safetensors")
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    )
