"""The server's settings, each described once; the command line is derived from them."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_lite.errors import ConfigurationError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ServerSettings:
    """How to serve. Sizes in bytes or characters as named, times in seconds.

    Raises:
        ConfigurationError: a limit below 1, or an address beyond this machine without keys.
    """

    base_name: str = _setting("base", "Name of the base as clients give it in `model`.")
    adapters: str = _setting(
        "", "Adapters to load at the start and to serve, comma-separated; empty: the whole registry."
    )
    host: str = _setting("127.0.0.1", "Address to listen on; beyond this machine only with keys.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.")
    keys: Path | None = _setting(None, "JSON file of API keys and what each may use; none lets everybody in.")
    max_body_bytes: int = _setting(1_000_000, "Largest request body, in bytes.")
    max_prompt_characters: int = _setting(200_000, "Longest prompt or conversation, in characters.")
    max_new_tokens: int = _setting(1024, "Most tokens one request may ask for.")
    max_concurrent: int = _setting(64, "Requests in work at once; more are told to come back (429).")
    timeout_seconds: float = _setting(120.0, "Longest time one request may take, in seconds.")
    drain_seconds: int = _setting(30, "How long a stopping server lets its requests finish, in seconds.")

    def __post_init__(self) -> None:
        limits = ("max_body_bytes", "max_prompt_characters", "max_new_tokens", "max_concurrent", "timeout_seconds")
        low = [f"{name} is {getattr(self, name)}" for name in limits if not getattr(self, name) > 0]
        if low or self.drain_seconds < 0:
            raise ConfigurationError(f"The server's limits must be above 0: {', '.join(low) or 'drain_seconds'}.")
        if self.keys is None and not _on_this_machine(self.host):
            raise ConfigurationError(
                f"Listening on {self.host} lets others in, so it needs keys: give --keys FILE, or listen on 127.0.0.1."
            )

    @property
    def references(self) -> tuple[str, ...]:
        """The adapters to load at the start."""
        return tuple(part.strip() for part in self.adapters.split(",") if part.strip())


def _on_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
