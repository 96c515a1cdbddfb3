"""`demo`: open the app."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import HomeOption, say, waiting


def demo(
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; if not given, 7860 or the next free one.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than loopback needs --users.")
    ] = "127.0.0.1",
    users: Annotated[
        Path | None, typer.Option(help="A JSON file of logins with their roles; without it there is no login.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Hub to push to and pull from; $HF_ENDPOINT if not given.")
    ] = None,
    allowed_hosts: Annotated[
        str,
        typer.Option(
            help="Names under which the page is reached, separated by commas, besides IP addresses and localhost."
        ),
    ] = "",
    home: HomeOption = None,
) -> None:
    """Open the app: chat with the base and every adapter in the registry, switching in mid-conversation.

    Example: `adapterhub-lite demo --port 7860`
    """
    from adapterhub_app.launch import serve

    loading = waiting(f"loading {base} and proving that it is computed right")
    serve(
        base, home=home, host=host, port=port, users=users, hub=endpoint, allowed_hosts=allowed_hosts,
        loading=loading, tell=say,
    )  # fmt: skip
