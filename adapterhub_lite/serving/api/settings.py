"""The server's settings, each described once; the command line is derived from them."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.setting import setting

ABOVE_ZERO = (
    "max_body_bytes", "max_prompt_characters", "max_new_tokens", "max_concurrent", "max_connections",
    "max_connections_per_address", "header_seconds", "body_seconds", "idle_seconds", "unread_seconds",
    "timeout_seconds",
)  # fmt: skip


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
    allowed_hosts: str = setting(
        "", "Names under which clients reach the server, comma-separated, besides localhost and IP addresses."
    )
    keys: Path | None = setting(None, "JSON file of API keys and what each may use; read again when it changes.")
    cache_memory: str = setting(
        "",
        "Memory for keys and values of running requests, such as 2GB; empty takes half of what is free at the start.",
    )
    quantization: str = setting(
        "", "Keep the base's linear layers as int8, int4 (a CPU only), nf4 or fp4; empty: as the base was saved."
    )
    max_body_bytes: int = setting(1_000_000, "Largest request body, in bytes.")
    max_prompt_characters: int = setting(200_000, "Longest prompt, in characters.")
    max_new_tokens: int = setting(1024, "Most new tokens that one request may ask for.")
    max_concurrent: int = setting(64, "Prompts in work at once, in all and per key (without keys: per address).")
    max_connections: int = setting(1000, "Open connections in all; the longest idle one makes room.")
    max_connections_per_address: int = setting(500, "Open connections of one address.")
    header_seconds: float = setting(10.0, "Time for the first byte of a request, and for its whole header, in seconds.")
    body_seconds: float = setting(30.0, "Time for the whole body of a request, in seconds.")
    idle_seconds: float = setting(15.0, "Time a connection may stay open between two requests, in seconds.")
    unread_seconds: float = setting(30.0, "Time a client may leave an answer unread, in seconds.")
    timeout_seconds: float = setting(120.0, "Longest time one request may take, in seconds.")
    drain_seconds: int = setting(
        10, "After SIGTERM, seconds to say 503 on /ready; running requests finish in any case."
    )

    def __post_init__(self) -> None:
        low = [f"{name} is {getattr(self, name)}" for name in ABOVE_ZERO if not getattr(self, name) > 0]
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

    @property
    def own_hosts(self) -> tuple[str, ...]:
        """The names that a Host header may have."""
        return (self.host, *(part.strip() for part in self.allowed_hosts.split(",") if part.strip()))


def _on_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
