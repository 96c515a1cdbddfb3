"""`serve`: the OpenAI-compatible server on one resident base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import HomeOption, say
from adapterhub_lite.serving.api_settings import ServerSettings


@options_from(ServerSettings)
def serve(
    given: dict[str, Any],
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings; options given here win.")] = None,
    home: HomeOption = None,
) -> None:
    """Serve the base and its adapters to OpenAI clients, on 127.0.0.1 unless told otherwise; SIGTERM drains.

    Example: `adapterhub-lite serve --adapters sql@prod,event --port 8000`
    """
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving import InferenceEngine
    from adapterhub_lite.serving.api_auth import KeyRing
    from adapterhub_lite.serving.api_server import ApiServer

    settings = build_settings(ServerSettings, {"base_name": Path(base).name, **given}, config)
    registry = AdapterRegistry(home)
    keys = KeyRing.read(settings.keys)
    with InferenceEngine.from_base(base, registry=registry, home=home) as engine:
        server = ApiServer(engine, registry, settings, keys)
        say(f"Serving {settings.base_name} on {server.url}/v1. Ctrl+C stops it.")
        server.run()
