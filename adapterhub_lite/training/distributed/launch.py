"""One run on several devices or machines: a process each, started by torch's own agent. Knows processes, not training.

A process that is started here, by `torchrun` or by `accelerate launch` finds WORLD_SIZE and RANK in its environment.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from adapterhub_lite import devices
from adapterhub_lite.errors import ConfigurationError, RunStoppedError, TrainingError

GROUP = "adapterhub-lite"
"""The name of the group of processes that is started here."""

USER_MISTAKE = 2
"""Exit code of a process that has said already what was wrong."""


@dataclass(frozen=True)
class Launch:
    """How many processes, and where they meet. `rendezvous` is HOST:PORT of one node, wanted for several nodes.

    Raises:
        ConfigurationError: fewer than one device or node, or several nodes without a place to meet.
    """

    devices: int = 1
    nodes: int = 1
    rendezvous: str = ""
    patience_seconds: int = 300

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1:
            raise ConfigurationError(f"{self.devices} devices on {self.nodes} nodes: wanted one or more of each.")
        host, _, port = self.rendezvous.rpartition(":")
        if self.nodes > 1 and not (host and port.isdigit()):
            raise ConfigurationError(
                f"{self.nodes} nodes must agree where to meet: give --rendezvous HOST:PORT of one of them to each, "
                f"not {self.rendezvous!r}."
            )

    @property
    def processes(self) -> int:
        """Processes on all nodes."""
        return self.devices * self.nodes


def launched() -> bool:
    """Whether this process is one of several that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def tells_of_stops() -> bool:
    """Whether this process says how a run was stopped: of several, the one that started them, else the first."""
    return os.environ.get("TORCHELASTIC_RUN_ID") != GROUP and is_first()


def announce(doing: str) -> None:
    """Say on standard error, from within a signal handler, that `doing` is finished before the run stops."""
    if tells_of_stops():
        # Not print: the handler may have come in the middle of one.
        os.write(2, f"\nStopping: {doing} is finished and saved first. Ctrl-C again ends at once.\n".encode())


def launch(wanted: Launch, arguments: Sequence[str]) -> None:
    """Run `python ARGUMENTS` in as many processes as `wanted` and wait for all of them.

    Raises:
        ConfigurationError: this machine has fewer GPUs, or a process found a mistake and has said so.
        TrainingError: a process was killed or failed, or the nodes did not find each other; the others were stopped.
        RunStoppedError: SIGTERM, SIGHUP or SIGQUIT came.
        KeyboardInterrupt: by Ctrl-C, when all processes have stopped: after they saved, or at once by a second.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = devices.count()
    if 0 < gpus < wanted.devices:
        raise ConfigurationError(f"{wanted.devices} devices were asked for; this machine has {gpus}.")
    # Its own account of a failure is a page long; ours is a sentence.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // wanted.devices)))
    config = LaunchConfig(
        min_nodes=wanted.nodes,
        max_nodes=wanted.nodes,
        nproc_per_node=wanted.devices,
        run_id=GROUP,
        rdzv_backend="c10d",
        rdzv_endpoint=wanted.rendezvous or "localhost:0",
        rdzv_configs=dict.fromkeys(("join_timeout", "timeout", "read_timeout"), wanted.patience_seconds),
        max_restarts=0,
        monitor_interval=0.1,
        # Ctrl-C is handed on below: the agent would give the processes half a minute for their step and then kill them.
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
    )
    try:
        with _handing_on_interrupts():
            elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _failure(rank, failure.exitcode, wanted) from None
    except SignalException as error:
        name = signal.Signals(error.sigval)
        raise RunStoppedError(f"The run was told to stop by {name.name}, and given 30 s to save.", name) from None
    except (RendezvousError, TimeoutError, ConnectionError) as error:
        raise TrainingError(
            f"{wanted.nodes} nodes did not meet at {wanted.rendezvous} within {wanted.patience_seconds} s ({error}). "
            "Start the same command on every node, and check that the port can be reached from all of them."
        ) from None


@contextmanager
def _handing_on_interrupts() -> Iterator[None]:
    """Hand a first Ctrl-C on to the processes, each a session of its own; kill them by a second.

    Raises:
        KeyboardInterrupt: there was one, and all processes have ended.
    """
    import psutil  # comes with Accelerate

    heard = 0

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        children = psutil.Process().children(recursive=heard > 1)
        if not children:
            raise KeyboardInterrupt
        if heard == 1:
            announce("what the processes are in")
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGINT if heard == 1 else signal.SIGKILL)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    except Exception:
        # Processes that ended because they were interrupted have not failed.
        if not heard:
            raise
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if heard:
        raise KeyboardInterrupt


def _failure(rank: int, code: int, wanted: Launch) -> ConfigurationError | TrainingError:
    which = f"Process {rank} of {wanted.processes}"
    if code == USER_MISTAKE:
        return ConfigurationError(f"{which} could not begin, for the reason above.")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return TrainingError(
        f"{which} {how}, and the others were stopped. The last checkpoint is whole: the same command goes on from it."
    )
