"""The server's settings, each described once; the command line is derived from them."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.setting import setting


@dataclass(frozen=True)
class ServerSettings:
    """How to serve. Sizes in bytes or characters as named, times in seconds.

    Raises:
        ConfigurationError: a limit below 1, or an address beyond this machine without keys.
    """

    base_name: str = setting("base", "Name of the base as clients give it in `model`.")
    adapters: str = setting("", "Adapters to load and serve, comma-separated; empty: all.")
    host: str = setting("127.0.0.1", "Address to listen on; beyond this machine only with keys.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    keys: Path | None = setting(None, "JSON file of API keys and what each may use.")
    max_body_bytes: int = setting(1_000_000, "Largest request body, in bytes.")
    max_prompt_characters: int = setting(200_000, "Longest prompt, in characters.")
    max_new_tokens: int = setting(1024, "Most new tokens that one request may ask for.")
    max_concurrent: int = setting(64, "Requests in work at once; more get a 429.")
    timeout_seconds: float = setting(120.0, "Longest time one request may take, in seconds.")
    drain_seconds: int = setting(30, "Time for requests to finish after SIGTERM, in seconds.")

    def __post_init__(self) -> None:
        limits = ("max_body_bytes", "max_prompt_characters", "max_new_tokens", "max_concurrent", "timeout_seconds")
        low = [f"{name} is {getattr(self, name)}" for name in limits if not getattr(self, name) > 0]
        if low or self.drain_seconds < 0:
            raise ConfigurationError(f"The server's limits must be above 0: {', '.join(low) or 'drain_seconds'}.")
        if not 0 <= self.port <= 65_535:
            raise ConfigurationError(f"There is no port {self.port}: give 0 (any free one) to 65535.")
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
