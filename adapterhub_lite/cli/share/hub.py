"""`hub`: run the embedded hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub_lite.cli.output import JsonOption, print_json, say
from adapterhub_lite.home import adapterhub_home

if TYPE_CHECKING:
    from adapterhub_lite.hub_server import Account


def hub(
    data: Annotated[Path | None, typer.Option(help="Folder for its repositories; <home>/hub when not given.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8765,
    token: Annotated[
        list[str] | None,
        typer.Option(
            help="A token and whose it is, as OWNER=TOKEN, with organisations as ann,team=TOKEN, or read-only as "
            "ann:read=TOKEN; may be repeated. Without any, everybody may read and write.",
            envvar="ADAPTERHUB_HUB_TOKENS",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a small Hugging Face Hub on loopback, for trying things out, tests and offline teams.

    Example: `adapterhub-lite hub --data ./hub --port 8765 --token ann,team=hf_secret`, then push and pull with
    `HF_ENDPOINT=http://127.0.0.1:8765 HF_TOKEN=hf_secret`
    """
    import logging
    import signal
    import threading

    from adapterhub_lite.hub_server import HubServer

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    tokens = dict(map(_account, token)) if token else None
    with HubServer(data or adapterhub_home() / "hub", port=port, tokens=tokens) as server:
        # In tests the faults are ordered and stay unsaid; here one is ours, and its traceback is wanted.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        if as_json:
            print_json({"url": server.url})
        else:
            say(f"Hub on {server.url}; use it with HF_ENDPOINT={server.url} or --endpoint. Ctrl+C stops it.")
        stop.wait()


def _account(text: str) -> "tuple[str, Account]":
    """(token, account) of one --token."""
    from adapterhub_lite.errors import ConfigurationError
    from adapterhub_lite.hub_server import Account

    owners, separator, secret = text.partition("=")
    owners, _, role = owners.partition(":")
    names = owners.split(",")
    if not (separator and secret and all(names) and role in ("", "read", "write")):
        # The text may hold a secret, so it is not repeated.
        raise ConfigurationError("A --token was not understood: wanted OWNER=TOKEN, ann,team=TOKEN or ann:read=TOKEN.")
    return secret, Account(names[0], role or "write", tuple(names[1:]))
