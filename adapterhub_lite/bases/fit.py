"""Whether an adapter is for a base: its modules that hold a matrix, and what it is called. From headers; no torch."""

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from adapterhub_lite.adapter_format.binding import Modules
from adapterhub_lite.adapter_format.folder import Inspection, inspect_folder
from adapterhub_lite.adapter_format.manifest import TEMPLATE_FILE
from adapterhub_lite.adapter_format.strict_reading import MAX_BASE_HEADER_BYTES, read_tensor_entries
from adapterhub_lite.bases.bounded_template import can_lay_out, template_problem
from adapterhub_lite.bases.fingerprint import ResolvedBase, is_commit
from adapterhub_lite.bases.resolve import HUB_ID
from adapterhub_lite.bases.structure import structure_in
from adapterhub_lite.errors import BaseMismatchError


def inspect_adapter(folder: Path, *, base: ResolvedBase | None = None, subject: str | None = None) -> Inspection:
    """Examine the adapter in `folder`. With `base`, every tensor has to bind to one of its modules.

    Never raises for what the folder holds.
    """
    if base is None:
        found = inspect_folder(folder, None, subject)
    else:
        found = inspect_folder(folder, base_modules(base.folder), subject, partial(structure_in, base.folder))
    if TEMPLATE_FILE in found.usable and not can_lay_out():
        found.notes.append(f"{TEMPLATE_FILE} was not tried out here: it is when the adapter is asked with a chat")
    elif TEMPLATE_FILE in found.usable:
        problem = template_problem((folder / TEMPLATE_FILE).read_bytes().decode("utf-8", "replace"))
        found.problems += [f"{TEMPLATE_FILE} lays out no chat: {problem}"] if problem else []
    return found


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
    files = sorted(folder.glob("*.safetensors"))
    stats = [(path, path.stat()) for path in files]
    return _base_modules(
        tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats)
    )


@lru_cache(maxsize=8)
def _base_modules(stamp: tuple[tuple[Path, int, int, int, int], ...]) -> Modules:
    found: dict[str, tuple[int, ...]] = {}
    for path, *_ in stamp:
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
