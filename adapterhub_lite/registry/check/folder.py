"""What an adapter folder must pass before anything of it is loaded: examined, and held against its base. No torch."""

from pathlib import Path

from adapterhub_lite.adapter_format.folder import Inspection, inspect_folder
from adapterhub_lite.bases import ResolvedBase, base_modules
from adapterhub_lite.bases.fingerprint import is_commit
from adapterhub_lite.errors import BaseMismatchError

__all__ = ["Inspection", "inspect_adapter"]


def inspect_adapter(folder: Path, *, base: ResolvedBase | None = None, subject: str | None = None) -> Inspection:
    """Examine the adapter in `folder`. With `base`, every tensor has to bind to one of its modules.

    Never raises for what the folder holds.
    """
    return inspect_folder(folder, base_modules(base.folder) if base else None, subject)


def check_base(found: Inspection, base: ResolvedBase) -> None:
    """Add to the problems of an adapter that its training record names another base than `base`.

    Raises:
        BaseMismatchError: that is all that is wrong with it.
    """
    recorded = found.training.base if found.training else None
    for revision in {base.revision, recorded.revision if recorded else None}:
        if not is_commit(revision):
            found.problems.append(f"the base's revision {revision!r:.80} is not a 40-hex commit")
    if recorded is not None and recorded.fingerprint != base.fingerprint:
        text = f"it was {recorded.difference(base.model_id, base.fingerprint, base.parts)}"
        if not found.problems:
            raise BaseMismatchError(f"{found.subject} is for another base: {text}.")
        found.problems.append(text)
