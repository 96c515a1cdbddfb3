"""The bases that the page trains on: the one that is served, and every other that lies on this machine, by name."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from adapterhub_app.backend import Backend
from adapterhub_lite.bases import EMBEDDED_BASES, ResolvedBase, known_bases, resolve_base
from adapterhub_lite.errors import UsageError
from adapterhub_lite.runs.folder import Run, list_runs

COMMIT_DIGITS = 8


def base_of(backend: Backend) -> ResolvedBase:
    """The files of the served base.

    Raises:
        UsageError: the app was started over an engine alone.
    """
    if backend.base is None:
        raise UsageError("This app does not know the files of its base. Start it with `adapterhub-lite demo --base`.")
    return backend.base


def bases_here(backend: Backend) -> dict[str, ResolvedBase]:
    """What can be trained on by the name that people pick it by: the served base first, then the others in their order.

    A name tells no path of this machine. Of bases with the same name, each after the first has its commit or a number.
    """
    found: dict[str, ResolvedBase] = {}
    for base in _each(backend):
        if any(base.folder.resolve() == other.folder.resolve() for other in found.values()):
            continue
        name = backend.base_name if base is backend.base else short_name(base)
        if name in found and base.revision:
            name = f"{name}@{base.revision[:COMMIT_DIGITS]}"
        number = sum(1 for one in found if one == name or one.startswith(f"{name} ("))
        found[f"{name} ({number + 1})" if number else name] = base
    return found


def _each(backend: Backend) -> Iterator[ResolvedBase]:
    """The served base, those of this home, and the folders that earlier runs were trained on."""
    home = backend.registry.home
    if backend.base is not None:
        yield backend.base
    yield from known_bases(home)
    for folder in sorted({run.state.base for run in list_runs(home) if Path(run.state.base).is_absolute()}):
        if (Path(folder) / "config.json").is_file() and any(Path(folder).glob("*.safetensors")):
            yield resolve_base(folder, home=home)


def short_name(base: ResolvedBase) -> str:
    """The name of an embedded base or of one of the Hub; of a folder its last part."""
    return base.name if base.name in EMBEDDED_BASES or base.revision else base.folder.name


def base_named(backend: Backend, name: str | None) -> ResolvedBase:
    """The base that somebody picked; the served one where nobody did.

    Raises:
        UsageError: there is no such base here (any more).
    """
    if not name or name == backend.base_name:
        return base_of(backend)
    here = bases_here(backend)
    if name not in here:
        raise UsageError(f"The base {name!r:.80} is not on this machine. Pick one of: {', '.join(here)}.")
    return here[name]


def is_served(backend: Backend, run: Run) -> bool:
    """Whether the engine of this page can answer with what a run has learned."""
    return run.state.base_fingerprint in ("", backend.engine.base_fingerprint)


def base_of_run(backend: Backend, run: Run) -> ResolvedBase:
    """The base that a run was trained on.

    Raises:
        UsageError: it is no longer on this machine, or is not what it was.
    """
    if is_served(backend, run):
        return base_of(backend)
    # The one that is called so first: of the others the fingerprint is only known once all of it was read.
    here = sorted(bases_here(backend).values(), key=lambda base: run.state.base not in (base.name, str(base.folder)))
    for base in here:
        if base.fingerprint == run.state.base_fingerprint:
            return base
    raise UsageError(
        f"The base of this run, {run.state.base}, is not on this machine as it was when the run began. Bring it back, "
        "and try again."
    )


def base_words(base: ResolvedBase) -> str:
    """How the command line is told of a base."""
    return base.name if base.name in EMBEDDED_BASES else str(base.folder)


def serving_words(base: ResolvedBase) -> str:
    """The command that opens this page over another base."""
    return f"adapterhub-lite demo --base {shlex.quote(base_words(base))}"
