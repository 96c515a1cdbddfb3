"""How an adapter is named: `sql`, `sql:3`, `sql@prod` or `sha256:...`. Knows the grammar, not what exists."""

import re
from dataclasses import dataclass

from adapterhub_lite.errors import ReferenceSyntaxError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Folders are named after adapters: these are devices on Windows. `base` is what a server calls the bare base.
RESERVED = {"base", "con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterReference:
    """One adapter, by name (newest version), name and version, name and alias, or digest alone."""

    name: str | None = None
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: "str | AdapterReference") -> "AdapterReference":
        """Read `name`, `name:3`, `name@alias` or `sha256:<64 hex>`.

        Raises:
            ReferenceSyntaxError: anything else.
        """
        if isinstance(text, AdapterReference):
            return text
        if isinstance(text, str):
            if DIGEST.fullmatch(text):
                return cls(digest=text)
            name, version_mark, version = text.partition(":")
            if version_mark and is_name(name) and re.fullmatch(r"[1-9][0-9]{0,8}", version):
                return cls(name=name, version=int(version))
            name, alias_mark, alias = text.partition("@")
            if alias_mark and is_name(name) and is_alias(alias):
                return cls(name=name, alias=alias)
            if is_name(text):
                return cls(name=text)
        raise ReferenceSyntaxError(
            f"Wanted an adapter as 'name', 'name:3', 'name@alias' or 'sha256:<64 hex digits>', got {text!r:.100}."
        )

    def __str__(self) -> str:
        if self.digest:
            return self.digest
        if self.version is not None:
            return f"{self.name}:{self.version}"
        return f"{self.name}@{self.alias}" if self.alias else str(self.name)


def is_name(text: str) -> bool:
    """Whether `text` may name an adapter: 1 to 64 letters, digits, `.`, `_`, `-`, not starting with a mark."""
    return NAME.fullmatch(text) is not None


def name_problem(text: str) -> str | None:
    """Why a new adapter may not be called `text`, or None. Older registries may hold names that are refused now."""
    if not is_name(text):
        return f"Wanted a name of 1 to 64 letters, digits, '.', '_', '-'; got {text!r:.80}."
    if text.partition(".")[0].lower() in RESERVED:
        return f"{text!r} is a reserved word (the bare base, or a device on some systems); choose another name."
    if text.endswith("."):
        return f"{text!r} ends with a full stop, which some file systems leave out; choose another name."
    return None


def is_alias(text: str) -> bool:
    """Whether `text` may be an alias: a name that is not all digits, so that it is never taken for a version."""
    return is_name(text) and not text.isdigit()
