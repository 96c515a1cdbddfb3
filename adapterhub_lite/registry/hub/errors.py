"""What went wrong at the hub, in our own exceptions, one sentence each. Knows `huggingface_hub`'s exceptions."""

import re
from collections.abc import Callable
from json import JSONDecodeError
from typing import Any

import httpx2
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapterhub_lite.errors import (
    AdapterHubError,
    HubError,
    HubPermissionError,
    HubUnreachableError,
    ResourceError,
    UnknownNameError,
    UsageError,
)

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
# What the client raises when it reads an answer that is JSON, but not the one it expects; HfUriError: a commit's address.
GARBLED = (LookupError, TypeError, AttributeError, RecursionError, HfUriError)
CAUGHT = (httpx2.HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError, *GARBLED)


class ConflictError(HubError):
    """The hub refused a write because the repository moved or is locked (409, 412)."""


class MissingRepoError(HubPermissionError):
    """There is no such repository, or none that this token may see."""


class RestError(HubUnreachableError):
    """The hub asks for a rest of `seconds` before the next try."""

    def __init__(self, text: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(text)


def translate(
    error: Exception, doing: str, repo_id: str, endpoint: str, identity: Callable[[], dict[str, Any] | None]
) -> AdapterHubError:
    """Our exception for one that `huggingface_hub` raised while `doing` something with a repository.

    `identity` answers who the token stands for (None: no token given); it is asked only when permission is the
    question.
    """
    where, cause = f"{doing} of {repo_id} at {endpoint}", _root(error)
    if isinstance(cause, GatedRepoError):
        return HubPermissionError(f"Could not {where}: it is gated. Accept its terms on its page, then use your token.")
    if isinstance(cause, DisabledRepoError):
        return HubPermissionError(f"Could not {where}: the hub has disabled it.")
    if isinstance(cause, RepositoryNotFoundError):
        return MissingRepoError(f"Could not {where}: {_missing(identity())}")
    if isinstance(cause, RevisionNotFoundError):
        return UnknownNameError(
            f"Could not {where}: there is no such revision. Ask for a tag like v1, or a full commit."
        )
    if isinstance(cause, HFValidationError):
        return UsageError(f"{repo_id!r} is not a repository id: wanted owner/name. {_short(cause)}")
    if isinstance(cause, HfHubHTTPError):
        return _by_status(cause, where, repo_id, identity)
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return HubError(f"Could not {where}: there is no such file.")
    if isinstance(cause, GARBLED):
        return HubUnreachableError(f"Could not {where}: the answer made no sense ({_short(cause)}). Try again later.")
    if isinstance(cause, OfflineModeIsEnabled):
        return HubUnreachableError(f"Could not {where}: HF_HUB_OFFLINE is set. Unset it, or pull with offline=True.")
    if (
        isinstance(cause, OSError)
        and cause.errno is not None
        and not isinstance(cause, (ConnectionError, TimeoutError))
    ):
        return ResourceError(f"Could not {where}: {cause.strerror} ({cause.filename}). Free or change that place.")
    if isinstance(cause, ValueError) and not isinstance(cause, (LocalEntryNotFoundError, JSONDecodeError)):
        return HubError(f"Could not {where}: {_short(cause)}")
    return HubUnreachableError(
        f"Could not {where}: {type(cause).__name__}: {_short(cause)}. Try again when it answers."
    )


def _root(error: Exception) -> BaseException:
    """The HTTP error inside the wrappers that uploads and cached downloads put around it."""
    found: BaseException = error
    while isinstance(found, (RuntimeError, LocalEntryNotFoundError)) and found.__cause__ is not None:
        found = found.__cause__
    return found


def _by_status(
    error: HfHubHTTPError, where: str, repo_id: str, identity: Callable[[], dict[str, Any] | None]
) -> AdapterHubError:
    status = error.response.status_code
    if status in (409, 412):
        return ConflictError(f"Could not {where}: it changed meanwhile, or is locked ({status}).")
    if status == 401:
        return HubPermissionError(f"Could not {where}: {_unauthorized(error)}")
    if status in (402, 403):
        return HubPermissionError(f"Could not {where}: {_forbidden(repo_id.partition('/')[0], identity())}")
    if status == 429:
        return RestError(f"Could not {where}: the hub is limiting requests (429). Try again later.", _rest_asked(error))
    if status in TRANSIENT:
        return HubUnreachableError(f"Could not {where}: the hub answered {status}. Try again later.")
    return HubError(f"Could not {where}: the hub answered {status}: {_short(error)}")


def _missing(who: dict[str, Any] | None) -> str:
    if who is None:
        return "it does not exist, or it is private and no token was given. Check the name, or pass a token."
    return f"it does not exist, or {who.get('name')!r} may not see it. Check the name and the token."


def _unauthorized(error: HfHubHTTPError) -> str:
    if "authorization" in error.response.request.headers:
        return "the token was not accepted. It may be mistyped, expired or revoked; pass a valid one."
    return "a token is needed. Pass one with write access."


def _forbidden(namespace: str, who: dict[str, Any] | None) -> str:
    if who is None:
        return "not without a token. Pass one with write access."
    name, orgs = who.get("name"), [org.get("name") for org in who.get("orgs", [])]
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"the token of {name!r} is read-only. Pass one with write access."
    if namespace not in (name, *orgs):
        known = f"is in {', '.join(map(str, orgs))}" if orgs else "is in no organisation"
        return (
            f"{name!r} does not belong to the organisation {namespace!r} ({known}). Ask to join, or pick another owner."
        )
    return f"the token of {name!r} may not write here. Pass one with write access to {namespace!r}."


def _rest_asked(error: HfHubHTTPError) -> float:
    headers = error.response.headers
    match = re.search(r"t=(\d+(?:\.\d+)?)", headers.get("ratelimit", ""))
    asked = match.group(1) if match else headers.get("retry-after", "")
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else 1.0


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
