"""The hub behind the registry: a reference such as "org/sql-lora:3" or "org/sql-lora@prod" is pulled at its first use.

What was pulled once is served without the hub. A miss that failed fails at once for a while, so that a hub that is
down costs one caller its time-out and not all of them.
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from adapterhub_lite.bases import ResolvedBase
from adapterhub_lite.errors import AdapterHubError, HubError, HubUnreachableError, UnknownNameError, UsageError
from adapterhub_lite.serving.adapters.sources import AdapterFiles, AdapterStore, PullReceipt, RegistrySource

REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<version>[1-9]\d*)|@(?P<alias>[\w.-]+))?")


class HubSource:
    """The registry's references, and those of the hub repositories that match one of `allowed` ("org/*").

    A version is pulled once. What may move (an alias, the newest) is asked for again after `refresh_seconds`, and the
    last known answer stands while the hub is down. `clock` gives seconds.
    """

    def __init__(
        self,
        registry: AdapterStore,
        allowed: Sequence[str],
        *,
        base: ResolvedBase | None = None,
        retry_seconds: float = 30.0,
        refresh_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        endpoint: str | None = None,
    ) -> None:
        self._registry = registry
        self._local = RegistrySource(registry, base)
        self._allowed = tuple(allowed)
        self._retry, self._refresh, self._clock = retry_seconds, refresh_seconds, clock
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._pulling: dict[str, threading.Lock] = {}
        self._known: dict[str, tuple[str, float]] = {}
        self._failed: dict[str, tuple[float, AdapterHubError]] = {}
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """What the last pull failed of, when the hub could not be reached; None when it could."""
        return self._trouble

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the files of `reference`, pulled first when it names a hub repository that is not here yet.

        Raises:
            UsageError: the repository is not one of those allowed.
            HubError, UnknownNameError: it is not here and cannot be had; the same at once until `retry_seconds` passed.
        """
        match = None if isinstance(reference, Path) else REFERENCE.fullmatch(reference)
        if match is None:
            return self._local.locate(reference)
        if not any(fnmatchcase(match["repo"], pattern) for pattern in self._allowed):
            raise UsageError(f"This engine does not pull {match['repo']!r}; allowed are: {', '.join(self._allowed)}.")
        revision = f"v{match['version']}" if match["version"] else f"@{match['alias']}" if match["alias"] else None
        return self._local.locate(self._pulled(match[0], match["repo"], revision))

    def _pulled(self, reference: str, repo: str, revision: str | None) -> str:
        """Return the registry's own reference for a hub reference."""
        with self._lock:
            lock = self._pulling.setdefault(reference, threading.Lock())
        with lock:
            now = self._clock()
            known = self._known.get(reference)
            fixed = revision is not None and not revision.startswith("@")
            if known is not None and (fixed or now < known[1]):
                return known[0]
            until, error = self._failed.get(reference, (now, None))
            if now < until:
                if known is not None:
                    return known[0]
                assert error is not None
                raise error.with_traceback(None)
            return self._pull(reference, repo, revision)

    def _pull(self, reference: str, repo: str, revision: str | None) -> str:
        try:
            receipt = self._registry.pull(repo, revision=revision, endpoint=self._endpoint)
            self._trouble = None
            self._failed.pop(reference, None)
        except (HubError, UnknownNameError) as error:
            self._failed[reference] = (self._clock() + self._retry, error)
            if not isinstance(error, HubUnreachableError):
                raise
            self._trouble = str(error)
            receipt = self._remembered(repo, revision, error)
        here = receipt.manifest.reference
        self._known[reference] = (here, self._clock() + self._refresh)
        return here

    def _remembered(self, repo: str, revision: str | None, error: HubUnreachableError) -> PullReceipt:
        """What an earlier pull of the same reference brought, perhaps by another process; or the error."""
        try:
            return self._registry.pull(repo, revision=revision, offline=True, endpoint=self._endpoint)
        except AdapterHubError:
            raise error from None
