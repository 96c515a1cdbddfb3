"""`demo`: open the app."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption


def demo(
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1; 7860 or the next free one if not given.")] = None,
    home: HomeOption = None,
) -> None:
    """Open the app on 127.0.0.1: chat with the base and every adapter in the registry, switching in mid-conversation.

    Example: `adapterhub-lite demo --port 7860`
    """
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving import InferenceEngine
    from app import launch

    registry = AdapterRegistry(home)
    with InferenceEngine.from_base(base, registry=registry, home=home) as engine:
        launch(engine, registry, port=port, base_name=Path(base).name, base=resolve_base(base, home=home))
