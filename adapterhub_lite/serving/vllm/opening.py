"""From settings to a running engine: vLLM started here or found at its addresses, checked to serve the base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.bases.fingerprint import ResolvedBase
from adapterhub_lite.errors import UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving.adapters.sources import RegistrySource
from adapterhub_lite.serving.vllm.adapter_files import largest_rank
from adapterhub_lite.serving.vllm.engine import VllmEngine
from adapterhub_lite.serving.vllm.process import VllmProcess, launch_of, shown
from adapterhub_lite.serving.vllm.settings import OWN, EngineSettings

Say = Callable[[str], None]


@contextmanager
def open_engine(
    base: str, settings: EngineSettings, registry: AdapterRegistry, *, home: str | Path | None = None, say: Say
) -> Iterator[VllmEngine]:
    """The engine that the settings ask for, with its vLLM running until the end. `say` tells what is waited for.

    Raises:
        UnknownNameError: no such base.
        ConfigurationError: vLLM cannot be started, or is none, or serves another base.
        EngineUnreachableError: nobody answers at an address.
    """
    resolved = resolve_base(base, home=home)
    source = RegistrySource(registry, resolved)
    rank = settings.vllm_max_rank
    if settings.engine != OWN:
        with VllmEngine(
            resolved, settings.engine_urls, source, key=settings.engine_secret(), max_rank=rank or None,
            slots=settings.engine_slots, folder=settings.engine_folder, home=adapterhub_home(home),
        ) as engine:  # fmt: skip
            yield engine
        return
    rank = rank or needed_rank(registry, resolved, settings)
    launch = launch_of(
        resolved.folder, name=settings.base_name, python=settings.vllm_python, command=settings.vllm_command,
        more=settings.vllm_args, max_rank=rank, max_loras=settings.vllm_max_loras, slots=settings.engine_slots,
    )  # fmt: skip
    say(f"Starting {shown(launch.command)} for ranks up to {rank}; this takes a while.")
    with VllmProcess(launch) as process, VllmEngine(
        resolved, (process.url,), source, key=process.key, max_rank=rank, slots=settings.engine_slots,
        folder=settings.engine_folder, home=adapterhub_home(home), scores_alone=process.on_cpu,
    ) as engine:  # fmt: skip
        process.on_end, engine.restarts = engine.end, lambda: process.restarts
        yield engine


def needed_rank(registry: AdapterRegistry, base: ResolvedBase, settings: EngineSettings) -> int:
    """The rank that vLLM has to take for what is served: the adapters that are named, or all for this base."""
    found = {}
    fingerprint = base.fingerprint
    for manifest in registry.list():
        if manifest.base.fingerprint == fingerprint and manifest.lora.is_plain:
            found[manifest.reference] = max([manifest.lora.rank, *manifest.lora.rank_pattern.values()])
    named: dict[str, int] = {}
    for reference in settings.references:
        try:
            name = registry.resolve(reference).name
        except UnknownNameError:
            continue
        named |= {one: rank for one, rank in found.items() if one.partition(":")[0] == name}
    return largest_rank(named or found)
