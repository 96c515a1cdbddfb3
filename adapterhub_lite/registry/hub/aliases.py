"""Aliases on a hub: `aliases.json` on `main`, changed only on top of the commit it was read from."""

import json

from adapterhub_lite.adapter_format.manifest import ALIASES_FILE, MAX_VERSION
from adapterhub_lite.adapter_format.reference import is_alias
from adapterhub_lite.adapter_format.strict_json import strict_json
from adapterhub_lite.errors import (
    AliasConflictError,
    IntegrityError,
    PublishConflictError,
    UnknownNameError,
    UsageError,
)
from adapterhub_lite.registry.hub.client import WRITE_TRIES, HubRepo, Patience

# Some ten thousand aliases.
ALIASES_BYTES = 1 << 20


def remote_aliases(repo_id: str, *, endpoint: str | None = None, token: str | None = None) -> dict[str, int]:
    """The aliases on the hub: alias -> version."""
    repo = HubRepo(repo_id, endpoint=endpoint, token=token)
    return aliases_at(repo, repo.head())


def aliases_at(repo: HubRepo, sha: str) -> dict[str, int]:
    """The aliases as a commit has them; IntegrityError when the file is not such a table."""
    if ALIASES_FILE not in repo.files(sha):
        return {}
    content = repo.read(sha, ALIASES_FILE, size=ALIASES_BYTES)
    try:
        found = strict_json(content, what="it", limit=ALIASES_BYTES)
    except ValueError as error:
        text = f"{ALIASES_FILE} of {repo.id} is not a table of aliases and versions: {error}. Mend it by hand."
        raise IntegrityError(text) from error
    if not all(is_alias(key) and type(value) is int and 0 < value <= MAX_VERSION for key, value in found.items()):
        raise IntegrityError(f"{ALIASES_FILE} of {repo.id} is not a table of aliases and versions. Mend it by hand.")
    return found


def push_alias(
    repo_id: str,
    alias: str,
    version: int | None,
    *,
    expect: int | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> dict[str, int]:
    """Point `alias` at a published version (None removes it) and return all aliases; by compare-and-swap.

    With `expect` nothing changes unless it points there (0: unless there is none); without it the last writer wins.
    No other alias is ever lost.

    Raises:
        AliasConflictError: it points elsewhere than `expect`.
        UnknownNameError: the version is not published.
        PublishConflictError, HubUnreachableError: others kept publishing, or no answer, after bounded tries.
    """
    if not is_alias(alias):
        raise UsageError(f"Wanted an alias of letters, digits, '.', '_', '-', not all digits; got {alias!r:.80}.")
    repo, patience = HubRepo(repo_id, endpoint=endpoint, token=token), Patience()
    for attempt in range(WRITE_TRIES):
        head = repo.head()
        found = aliases_at(repo, head)
        if found.get(alias) == version:
            return found
        if expect is not None and found.get(alias, 0) != expect:
            raise AliasConflictError(f"{alias!r} of {repo_id} is at {found.get(alias)}, not at {expect}. Look again.")
        if version is not None and f"v{version}" not in (tags := repo.tags()):
            raise UnknownNameError.among("published version", f"v{version}", sorted(tags))
        wanted = {key: value for key, value in {**found, alias: version}.items() if value is not None}
        text = json.dumps(wanted, indent=1, sort_keys=True).encode()
        with patience.sending(attempt):
            repo.commit(head, f"alias {alias} -> {version}", "", {ALIASES_FILE: text}, [])
    raise PublishConflictError(
        f"Others kept publishing to {repo_id} while {alias!r} was moved; try again later."
    ) from patience.last
