"""What a device can do, asked in one place: no other file compares a device with the name of a maker.

ROCm builds of torch call their devices "cuda" and go CUDA's way; Intel's are "xpu", Apple's "mps", and what registers
itself as `privateuse1` has a name of its own. What torch does not offer for a device is None here, and the caller has a
plain way for it.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

HOSTS = ("cpu", "meta")


def accelerator() -> torch.device | None:
    """The kind of accelerator that torch can use here, None without one."""
    return torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None


def preferred() -> str:
    """Where a model goes when nobody says where: the accelerator, else the CPU."""
    found = accelerator()
    return "cpu" if found is None else found.type


def count() -> int:
    """How many accelerators there are."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def is_accelerator(device: torch.device | str) -> bool:
    """Whether a device has memory of its own, or computes beside the CPU: neither the CPU nor meta."""
    return torch.device(device).type not in HOSTS


def is_cuda(device: torch.device) -> bool:
    """Whether torch speaks CUDA's interface to it, as it does to ROCm's: what kernels of others are written for."""
    return device.type == "cuda"


def runs_triton(device: torch.device) -> bool:
    """Whether Triton compiles kernels for it."""
    return device.type in ("cuda", "xpu")


def runs_flash_attn(kind: str) -> bool:
    """Whether the package flash_attn has kernels for a device of this type; from Ampere on, where it is CUDA's."""
    return kind == "cuda"


def multiprocessors(device: torch.device) -> int | None:
    """How many programs of a kernel a GPU runs at once, at least; None where torch does not say."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else None


def shared_memory_bytes(device: torch.device) -> int | None:
    """The most shared memory that a program of a kernel may ask for; None where torch does not say."""
    if device.type != "cuda":
        return None
    found: int | None = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return found


def compute_capability(device: torch.device | None = None) -> tuple[int, int] | None:
    """CUDA's number of what a GPU can do, such as (8, 0) from Ampere on; None elsewhere, where there is no such number."""
    if torch.version.cuda is None or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    return torch.cuda.get_device_capability(device)


def multiplies_into_fp32(device: torch.device) -> bool:
    """Whether a product of 16-bit matrices can be had in fp32, as it is summed, and not only rounded to 16 bits."""
    return is_accelerator(device) and _multiplies_into_fp32(device.type)


@functools.cache
def _multiplies_into_fp32(kind: str) -> bool:
    # Asked of the device: which builds of torch have it changes from version to version.
    tried = torch.ones(16, 16, dtype=torch.bfloat16, device=kind)
    try:
        torch.mm(tried, tried, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a device's own memory that nothing holds now; None where torch does not say."""
    offered = _offered(device)
    if hasattr(offered, "mem_get_info"):
        return int(offered.mem_get_info(device)[0])
    if hasattr(offered, "recommended_max_memory"):
        return max(0, int(offered.recommended_max_memory() - offered.driver_allocated_memory()))
    return None


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate on `device` now; 1 << 40 where the machine does not say."""
    on_device = free_bytes(device)
    if on_device is not None:
        return on_device
    limits = [1 << 40]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(soft - pages * resource.getpagesize())
    return max(0, min(limits))


def peak_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a device since `reset_peak`, in bytes; None where torch does not count it."""
    offered = _offered(device)
    return int(offered.max_memory_allocated(device)) if hasattr(offered, "max_memory_allocated") else None


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, where it is counted."""
    offered = _offered(device)
    if hasattr(offered, "reset_peak_memory_stats"):
        offered.reset_peak_memory_stats(device)


def counts_peak(device: torch.device) -> bool:
    """Whether `peak_bytes` is known."""
    return hasattr(_offered(device), "max_memory_allocated")


def empty_cache() -> None:
    """Give back what the accelerator's allocator keeps for later."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def random_states() -> Any:
    """The states of the accelerator's random numbers, of all devices, for `set_random_states`; None where there are none."""
    found = accelerator()
    if found is None:
        return None
    offered = _offered(found)
    read = getattr(offered, "get_rng_state_all", getattr(offered, "get_rng_state", None))
    return None if read is None else read()


def set_random_states(states: Any) -> None:
    """Put back what `random_states` returned."""
    found = accelerator()
    if found is None or states is None:
        return
    offered = _offered(found)
    if hasattr(offered, "set_rng_state_all"):
        offered.set_rng_state_all(states)
    else:
        offered.set_rng_state(states)


def pins_memory() -> bool:
    """Whether host memory can be pinned for the accelerator, so that a copy to it waits for nothing."""
    found = accelerator()
    return found is not None and found.type in ("cuda", "xpu")


class Recorder(Protocol):
    """Keeps what a call asks of a device, to be asked again at once."""

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Make a call; return its result, whose memory stays, and what writes it anew from the memory that the call read.

        Raises:
            Exception: the call waited for the device, or did something else that cannot be recorded.
        """
        ...


class _GraphRecorder:
    """Records CUDA graphs, and those of other makers that torch offers in the same words."""

    def __init__(self, offered: Any, kind: Any) -> None:  # a module of torch's, and a class of it
        self._offered, self._kind = offered, kind
        # One for all recordings, as no two are replayed at once; memory of one pool is shared on one stream.
        self._pool: Any = offered.graph_pool_handle()
        self._stream: Any = offered.Stream()

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """As the protocol says."""
        stream = self._stream
        stream.wait_stream(self._offered.current_stream())
        with self._offered.stream(stream):
            call()  # what libraries set up at a first call is not for a recording
        self._offered.current_stream().wait_stream(stream)
        graph = self._kind()
        # Meanwhile other threads may copy adapters to the device, which is no part of this.
        with self._offered.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = call()
        return out, graph.replay


def graph_recorder(device: torch.device) -> Recorder | None:
    """What records calls on a device; None where torch has no graphs for it."""
    offered = _offered(device)
    kind = getattr(offered, "CUDAGraph", None)
    return None if kind is None else _GraphRecorder(offered, kind)


class CopyLane(Protocol):
    """Copies to a device that wait for nothing that is computed there. `staging` is pinned host memory, as bytes."""

    staging: torch.Tensor

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device, to be filled by this lane and read by whoever computes."""
        ...

    def copy(self, target: torch.Tensor, staged: torch.Tensor) -> None:
        """Begin to copy a part of `staging`, which has to stay as it is until `wait`."""
        ...

    def wait(self) -> None:
        """Return when every copy that was begun has ended."""
        ...


class _StreamLane:
    """A stream of its own, of CUDA or what torch offers in the same words."""

    def __init__(self, device: torch.device, offered: Any, nbytes: int) -> None:  # a module of torch's
        self._device, self._offered = device, offered
        self._stream: Any = offered.Stream(device)
        self._ended: Any = offered.Event()
        self.staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """As the protocol says."""
        with self._offered.stream(self._stream):
            made = torch.empty(shape, dtype=dtype, device=self._device)
        # Its memory is not this lane's again before what computes with it then has ended.
        made.record_stream(self._offered.current_stream(self._device))
        return made

    def copy(self, target: torch.Tensor, staged: torch.Tensor) -> None:
        """As the protocol says."""
        with self._offered.stream(self._stream):
            target.copy_(staged, non_blocking=True)

    def wait(self) -> None:
        """As the protocol says."""
        self._ended.record(self._stream)
        self._ended.synchronize()


def copy_lane(device: torch.device, nbytes: int) -> CopyLane | None:
    """A lane with `nbytes` of pinned memory; None where there is none for a device, or so much cannot be pinned."""
    if not is_accelerator(device) or not pins_memory():
        return None
    try:
        return _StreamLane(device, _offered(device), nbytes)
    except RuntimeError:
        return None


def name_of(device: torch.device) -> str | None:
    """The maker's name of an accelerator, None where torch does not say."""
    offered = _offered(device)
    return str(offered.get_device_name(device)) if hasattr(offered, "get_device_name") else None


def _offered(device: torch.device) -> Any:  # a module of torch's, each with other functions
    if not is_accelerator(device):
        return None
    try:
        return torch.get_device_module(device)
    except RuntimeError:  # a backend that registered none
        return None


def trim_heap() -> bool:
    """Return what is free in the C heap to the system now; False where the heap is not glibc's."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "malloc_trim"):
        return False
    libc.malloc_trim(0)  # type: ignore[union-attr]
    return True


# A step of a Llama asks for about twenty products. Each is half a megabyte of code, made in a fifth of a millisecond.
KEPT_PRODUCTS = 64


def keep_little_code() -> None:
    """Have oneDNN keep the code of the last `KEPT_PRODUCTS` products, not of 1,024; before the first product of the process.

    It makes code for each number of tokens: over rows of many lengths a run grows by what is kept. What the user has set stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
