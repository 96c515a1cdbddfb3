"""The settings of a server with another engine behind it. Imports nothing of it: only its options stand here."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.cluster.settings import ClusterSettings
from adapterhub_lite.setting import setting

OWN = "vllm"


@dataclass(frozen=True)
class EngineSettings(ClusterSettings):
    """How to serve, and which engine computes: the embedded one, replicas of it, or vLLM.

    Raises:
        ConfigurationError: as for replicas, and for an engine that is no vLLM, or settings of one that is not asked for.
    """

    engine: str = setting(
        "", "Who computes: empty for this process, `vllm` to start one, or URLs of running ones, comma-separated."
    )
    engine_key: Path | None = setting(None, "With --engine URL: a file with the key that vLLM was started with.")
    engine_folder: Path | None = setting(
        None, "With --engine: folder for adapters' files that vLLM sees under the same path; empty for this machine's."
    )
    engine_slots: int = setting(64, "With --engine: adapters to keep loaded in each vLLM.")
    vllm_python: Path | None = setting(None, "With --engine vllm: the Python of the environment with vLLM.")
    vllm_command: str = setting(
        "", "With --engine vllm: the command that serves, such as a container's; `vllm serve` of the path if empty."
    )
    vllm_args: str = setting("", "With --engine vllm: more of vLLM's own options, as on its command line.")
    vllm_max_rank: int = setting(0, "With --engine: the largest rank that vLLM takes; 0 for what the registry needs.")
    vllm_max_loras: int = setting(8, "With --engine vllm: different adapters in one batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"--{name.replace('_', '-')}" for name in _OF_OWN if getattr(self, name)]
        if given and self.engine != OWN:
            raise ConfigurationError(
                f"{', '.join(given)} is for a vLLM that is started here: give --engine vllm with it."
            )
        if self.engine and self.cluster:
            raise ConfigurationError(
                "--cluster makes replicas of our own engine, --engine asks another: give one of them."
            )
        if self.engine and self.cache_memory:
            raise ConfigurationError(
                "--cache-memory is for our own engine; vLLM's is among its own options (--vllm-args)."
            )
        if self.engine and self.quantization:
            raise ConfigurationError(
                "--quantization is for our own engine; vLLM's is among its own options (--vllm-args)."
            )
        if self.vllm_python and self.vllm_command:
            raise ConfigurationError("--vllm-python and --vllm-command both say what to start: give one of them.")
        if self.engine == OWN and self.engine_key:
            raise ConfigurationError(
                "--engine-key is for a vLLM that runs already; the one started here gets a random key."
            )
        if self.engine_slots < 1 or self.vllm_max_rank < 0 or self.vllm_max_loras < 1:
            raise ConfigurationError("--engine-slots and --vllm-max-loras are at least 1, --vllm-max-rank at least 0.")
        for url in self.engine_urls:
            _check_url(url)

    @property
    def engine_urls(self) -> tuple[str, ...]:
        """The running vLLM servers to ask; none where one is started here."""
        return () if self.engine == OWN else tuple(part.strip() for part in self.engine.split(",") if part.strip())

    def engine_secret(self) -> str | None:
        """The key in the file of `engine_key`.

        Raises:
            ConfigurationError: it cannot be read, or holds none.
        """
        if self.engine_key is None:
            return None
        try:
            key = self.engine_key.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The key in {self.engine_key} cannot be read: {error}.") from error
        if not key or not key.isascii() or len(key.split()) > 1:
            raise ConfigurationError(f"{self.engine_key} holds no key: wanted one line with the key alone.")
        return key


_OF_OWN = ("vllm_python", "vllm_command", "vllm_args")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.username:
        raise ConfigurationError(
            f"--engine is {url!r}: wanted `vllm`, or addresses such as http://127.0.0.1:8001, without a path or a password."
        )


def is_loopback(url: str) -> bool:
    """Whether a server is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
