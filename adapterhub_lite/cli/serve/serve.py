"""`serve`: the OpenAI-compatible server on one resident base, on replicas of it, or before vLLM."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import HomeOption, say, waiting
from adapterhub_lite.installation import missing_extra
from adapterhub_lite.serving.vllm.settings import EngineSettings


@options_from(EngineSettings)
def serve(
    given: dict[str, Any],
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings; options given here win.")] = None,
    home: HomeOption = None,
) -> None:
    """Serve the base and its adapters to OpenAI clients, on 127.0.0.1 unless told otherwise; SIGTERM drains.

    Example: `adapterhub-lite serve --adapters sql@prod,event --port 8000`
    """
    from adapterhub_lite.cli.train.plan import parse_bytes
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving.api.auth import KeyRing
    from adapterhub_lite.serving.api.engine_protocol import Engine
    from adapterhub_lite.serving.api.server import ApiServer, bound_socket

    settings = build_settings(EngineSettings, {"base_name": Path(base).name, **given}, config)
    cache_memory = parse_bytes(settings.cache_memory) if settings.cache_memory else None
    registry = AdapterRegistry(home)
    keys = KeyRing.read(settings.keys)
    for reference in settings.references:
        # A misspelt reference is refused now, not after the base is loaded.
        registry.resolve(reference)
    bound_socket(settings.host, settings.port).close()  # before the base is loaded, which takes longer
    if not settings.engine:
        say(f"Loading {base}.")
    with ExitStack() as stack:
        if settings.engine:
            from adapterhub_lite.serving.vllm.opening import open_engine

            engine: Engine = stack.enter_context(open_engine(base, settings, registry, home=home, say=say))
        elif settings.cluster:
            try:
                from adapterhub_lite.serving.cluster.replicas import ClusterEngine
            except ImportError as error:
                raise missing_extra("--cluster", "cluster") from error
            say(f"Starting {settings.replicas} replicas; this takes a while.")
            engine = stack.enter_context(
                ClusterEngine(
                    base, settings, home=home, cache_memory=cache_memory, quantization=settings.quantization or None
                )
            )
        else:
            from adapterhub_lite.serving import InferenceEngine

            with waiting(f"loading {base} and proving that it is computed right"):
                alone = InferenceEngine.from_base(
                    base,
                    registry=registry,
                    home=home,
                    cache_memory=cache_memory,
                    quantization=settings.quantization or None,
                )
                engine = stack.enter_context(alone)
                alone.prepare()
        server = ApiServer(engine, registry, settings, keys)
        say(f"Serving {settings.base_name} on {server.url}/v1. Ctrl+C stops it.")
        server.run()
