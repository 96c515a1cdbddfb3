"""Who may use what. Keys are kept and compared as sha256, and never written anywhere.

The file of keys is read again when it changes, so that a key can be given or taken away while the server runs.
"""

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.files import COARSE_SECONDS, file_stamp, seconds_to_settle
from adapterhub_lite.serving.api.errors import ApiRefusal, error_response

logger = logging.getLogger("adapterhub.keys")
FORM = (
    '{"keys": {"<key>": ["<adapter name>", ...]}, "admin": "<key>", "metrics": "<key>"}, with "*" for every adapter; '
    'or {"adapters": [...], "requests_in_work": 8, "tokens_per_minute": 20000} for a key with limits'
)
Key = Annotated[str, Field(min_length=1, max_length=512)]


class KeyRights(StrictModel):
    """What one key opens, and its limits; None is no limit of its own."""

    adapters: tuple[str, ...] = ()
    requests_in_work: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)


class KeyFile(StrictModel):
    """The file of keys: key -> names of the adapters it opens ("*" for all) or its rights, and two keys with duties.

    `admin` may change what is served; `metrics` may read the metrics of everybody and nothing else.
    """

    keys: dict[Key, tuple[str, ...] | KeyRights] = Field(default_factory=dict)
    admin: Key | None = None
    metrics: Key | None = None

    @model_validator(mode="after")
    def _one_duty_each(self) -> "KeyFile":
        named = [key for key in (*self.keys, self.admin, self.metrics) if key is not None]
        if len(named) != len(set(named)):
            raise ValueError("a key is named twice; each has one duty")
        return self


@dataclass(frozen=True)
class Caller:
    """Who is asking. `label` tells callers apart in the log; `adapters` None means all.

    `tenant` is who shares of the server are counted for: the key, without keys the address.
    """

    label: str
    adapters: frozenset[str] | None = None
    admin: bool = False
    metrics_only: bool = False
    requests_in_work: int | None = None
    tokens_per_minute: int | None = None
    tenant: str = ""

    def may_use(self, name: str) -> bool:
        """Whether this caller may use the adapter of this name; the bare base is open to every key."""
        return self.adapters is None or name in self.adapters


class KeyRing:
    """The keys in force. Without any, everybody may use every adapter, and nobody is admin. Thread-safe."""

    def __init__(self, file: KeyFile | None = None) -> None:
        self.open = file is None
        self._path: Path | None = None
        self._stamp: tuple[int, ...] | None = None
        self._lock = threading.Lock()
        self._callers = _callers(file or KeyFile())

    @classmethod
    def read(cls, path: Path | None) -> "KeyRing":
        """Read a file of keys; None gives an open ring.

        Raises:
            ConfigurationError: it cannot be read, is not such a file, or others on this machine can read it.
        """
        if path is None:
            return cls()
        stamp = _stamp(path)
        ring = cls(_read(path))
        ring._path, ring._stamp = path, stamp
        return ring

    def refresh(self, *, forced: bool = False) -> None:
        """Read the file again if it has changed. A file that cannot be used changes nothing, and is logged."""
        if self._path is None:
            return
        with self._lock:
            stamp = _stamp(self._path)
            if stamp is not None and stamp == self._stamp and not forced:
                return
            # Whatever comes of it: it is looked at again when it changes again.
            self._stamp = stamp
            try:
                self._callers = _callers(_read(self._path))
                logger.warning("The file of keys was read again: %d keys are in force.", len(self._callers))
            except ConfigurationError as error:
                logger.error("%s The keys read before stay in force.", error)

    def caller(self, authorization: str | None) -> Caller | None:
        """Who an Authorization header stands for; None when it is nobody."""
        if self.open:
            return Caller("anyone")
        self.refresh()
        scheme, _, key = (authorization or "").partition(" ")
        # Looked up by hash: how long it takes tells nothing about the keys.
        return self._callers.get(_hashed(key.strip())) if scheme.lower() == "bearer" else None


class Authenticate:
    """Puts the caller into the request's state, or refuses with 401 before anything of the body is read.

    `public` are the paths that need no key.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, public: Collection[str]) -> None:
        self.app, self.keys, self.public = app, keys, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on a request whose caller is known."""
        if scope["type"] != "http" or scope["path"] in self.public:
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("authorization")
        caller = self.keys.caller(given)
        if caller is None:
            problem = "is not known" if given else "is missing"
            text = f"The API key {problem}: send 'Authorization: Bearer <key>'."
            return await error_response(ApiRefusal(401, text, "invalid_api_key"))(scope, receive, send)
        address = scope["client"][0] if scope.get("client") else "unknown"
        tenant = address if self.keys.open else caller.label
        scope.setdefault("state", {})["caller"] = replace(caller, tenant=tenant)
        await self.app(scope, receive, send)


def _read(path: Path) -> KeyFile:
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            content = stream.read()
    except OSError as error:
        raise ConfigurationError(f"The file of keys {path} cannot be read ({error.strerror}).") from error
    if os.name == "posix" and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(f"Others on this machine can use the keys in {path}. Run: chmod 600 {path}")
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        reason = error.errors(include_input=False)[0]["msg"]
        raise ConfigurationError(f"{path} is not a file of keys ({reason}): wanted {FORM}.") from error


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes whenever the file does, its rights included; None while a further change might not show, () without a file."""
    try:
        stamp = file_stamp(path)
    except OSError:
        return ()
    return None if 0 < seconds_to_settle([stamp]) <= COARSE_SECONDS else stamp


def _callers(file: KeyFile) -> dict[bytes, Caller]:
    callers = {}
    for key, given in file.keys.items():
        rights = given if isinstance(given, KeyRights) else KeyRights(adapters=given)
        adapters = None if "*" in rights.adapters else frozenset(rights.adapters)
        callers[_hashed(key)] = Caller(
            _label(key), adapters, requests_in_work=rights.requests_in_work, tokens_per_minute=rights.tokens_per_minute
        )
    if file.admin:
        callers[_hashed(file.admin)] = Caller(_label(file.admin), admin=True)
    if file.metrics:
        callers[_hashed(file.metrics)] = Caller(_label(file.metrics), frozenset(), metrics_only=True)
    return callers


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _label(key: str) -> str:
    return f"key-{_hashed(key).hex()[:8]}"
