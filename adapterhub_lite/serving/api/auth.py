"""Who may use which adapter. Keys are kept and compared as sha256, and never written anywhere."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.record import StrictModel
from adapterhub_lite.errors import ConfigurationError


class KeyFile(StrictModel):
    """The file of keys: key -> names of the adapters it may use ("*" for all), and the admin's key."""

    keys: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    admin: str | None = None


@dataclass(frozen=True)
class Caller:
    """Who is asking. `label` tells callers apart in the log; `adapters` None means all."""

    label: str
    adapters: frozenset[str] | None = None
    admin: bool = False

    def may_use(self, name: str) -> bool:
        """Whether this caller may use the adapter of this name; the bare base is everybody's."""
        return self.adapters is None or name in self.adapters


class KeyRing:
    """The keys in force. Without any, everybody may use every adapter, and nobody is admin."""

    def __init__(self, file: KeyFile | None = None) -> None:
        self._callers: dict[bytes, Caller] = {}
        self.open = file is None
        for key, names in (file.keys if file else {}).items():
            self._callers[_hashed(key)] = Caller(_label(key), None if "*" in names else frozenset(names))
        if file and file.admin:
            self._callers[_hashed(file.admin)] = Caller(_label(file.admin), None, admin=True)

    @classmethod
    def read(cls, path: Path | None) -> "KeyRing":
        """Read a file of keys; None gives an open ring.

        Raises:
            ConfigurationError: it cannot be read, or is not such a file.
        """
        if path is None:
            return cls()
        try:
            return cls(KeyFile.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise ConfigurationError(
                f"{path} is not a file of keys ({reason}): wanted "
                '{"keys": {"<key>": ["<adapter name>", ...]}, "admin": "<key>"}, with "*" for every adapter.'
            ) from error

    def caller(self, authorization: str | None) -> Caller | None:
        """Who an Authorization header stands for; None when it is nobody."""
        scheme, _, key = (authorization or "").partition(" ")
        # Looked up by hash: how long it takes tells nothing about the keys.
        found = self._callers.get(_hashed(key.strip())) if scheme.lower() == "bearer" else None
        return found or (Caller("anyone") if self.open else None)


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _label(key: str) -> str:
    return f"key-{_hashed(key).hex()[:8]}"
