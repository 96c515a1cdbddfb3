"""`demo`: open the app."""

from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption


def demo(
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    port: Annotated[int, typer.Option(help="First port to try on 127.0.0.1.")] = 7860,
    home: HomeOption = None,
) -> None:
    """Open the app on 127.0.0.1: chat with the base and every adapter in the registry, switching in mid-conversation.

    Example: `adapterhub-lite demo --port 7860`
    """
    from app import launch

    launch(base=base, home=home, port=port)
