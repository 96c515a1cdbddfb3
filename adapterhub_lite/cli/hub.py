"""`hub`: run the embedded hub."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import JsonOption, print_json, say
from adapterhub_lite.home import adapterhub_home


def hub(
    data: Annotated[Path | None, typer.Option(help="Folder for its repositories; <home>/hub when not given.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 8765,
    as_json: JsonOption = False,
) -> None:
    """Run a small Hugging Face Hub on loopback, for trying things out, tests and offline teams.

    Example: `adapterhub-lite hub --data ./hub --port 8765`, then `HF_ENDPOINT=http://127.0.0.1:8765`
    """
    import signal
    import threading

    from adapterhub_lite.hub_server import HubServer

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(data or adapterhub_home() / "hub", port=port) as server:
        if as_json:
            print_json({"url": server.url})
        else:
            say(f"Hub on {server.url}; use it with HF_ENDPOINT={server.url} or --endpoint. Ctrl+C stops it.")
        stop.wait()
