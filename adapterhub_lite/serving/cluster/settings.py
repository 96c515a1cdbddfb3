"""The settings of a server with replicas. Imports no ray: only the names of its options stand here."""

from dataclasses import dataclass
from typing import Any

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.api.settings import ServerSettings
from adapterhub_lite.setting import setting


@dataclass(frozen=True)
class ClusterSettings(ServerSettings):
    """How to serve, with `cluster` on several replicas.

    Raises:
        ConfigurationError: as for the server, and for fewer replicas than one or a largest number below the smallest.
    """

    cluster: bool = setting(False, "Serve from replicas in Ray (extra `cluster`) instead of this process.")
    replicas: int = setting(2, "With --cluster: replicas to keep running.")
    max_replicas: int = setting(0, "With --cluster: replicas to grow to under load; 0 does not grow.")
    replica_cpus: float = setting(1.0, "With --cluster: processors for each replica.")
    replica_gpus: float = setting(0.0, "With --cluster: GPUs for each replica, parts of one allowed.")
    ray_address: str = setting("", "With --cluster: a Ray cluster to join; empty starts one on this machine.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas < 1 or 0 < self.max_replicas < self.replicas:
            raise ConfigurationError(
                f"replicas is {self.replicas} and max_replicas {self.max_replicas}: give at least 1 replica, and "
                "at least as many for max_replicas, or 0 not to grow."
            )

    def deployment(self) -> dict[str, Any]:
        """The options of Ray Serve's deployment."""
        actor = {"num_cpus": self.replica_cpus, "num_gpus": self.replica_gpus}
        if not self.max_replicas:
            return {"num_replicas": self.replicas, "ray_actor_options": actor}
        growing = {"min_replicas": self.replicas, "max_replicas": self.max_replicas, "target_ongoing_requests": 16}
        return {"autoscaling_config": growing, "ray_actor_options": actor}
