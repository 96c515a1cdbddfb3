"""`hub`: run the embedded hub, or free what it no longer needs."""

from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.cli.output import DryRunOption, JsonOption, megabytes, print_json, say, would
from adapterhub_lite.errors import ConfigurationError, UnknownNameError
from adapterhub_lite.home import adapterhub_home


def hub(
    action: Annotated[
        str, typer.Argument(help="run; or gc: free contents that no commit names, with the hub stopped.")
    ] = "run",
    data: Annotated[Path | None, typer.Option(help="Folder for its repositories; <home>/hub if not given.")] = None,
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
    quota: Annotated[
        int | None, typer.Option(min=1, help="Megabytes that one repository may hold, over all its commits.")
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="A name under which a proxy serves it; may be repeated.", show_default=False),
    ] = None,
    requests_per_minute: Annotated[
        int, typer.Option(min=1, help="Requests per minute of one account, or of one address without a token.")
    ] = 10_000,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a small Hugging Face Hub on loopback, for trying things out, tests and offline teams.

    Example: `adapterhub-lite hub --data ./hub --port 8765 --token ann,team=hf_secret`, then push and pull with
    `HF_ENDPOINT=http://127.0.0.1:8765 HF_TOKEN=hf_secret`
    """
    import logging
    import signal
    import threading

    from adapterhub_lite.hub_server import Account, HubServer

    folder = data or adapterhub_home() / "hub"
    if action == "gc":
        return free_contents(folder, as_json, dry_run)
    if action != "run":
        raise UnknownNameError.among("action of hub", action, ["run", "gc"])
    tokens = {secret: Account(*account) for secret, account in map(parse_token, token or ())}
    if dry_run:
        return would(f"serve {folder} on port {port}", as_json, data=str(folder), port=port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(
        folder, port=port, tokens=tokens or None, quota_bytes=quota and quota * 1_000_000, hosts=host_name or (),
        requests_per_minute=requests_per_minute,
    ) as server:  # fmt: skip
        # Tests inject faults on purpose and keep this quiet; here an error is a defect, so its traceback is logged.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        told = f"Hub on {server.url}; use it with HF_ENDPOINT={server.url} or --endpoint. Ctrl+C stops it."
        print_json({"url": server.url}) if as_json else say(told)
        stop.wait()


def free_contents(folder: Path, as_json: bool, dry_run: bool) -> None:
    """`hub gc`: free the contents that no commit names."""
    from adapterhub_lite.hub_server.gc import collect

    found = collect(folder, dry_run=dry_run)
    act = f"{len(found.contents)} contents, {megabytes(found.freed_bytes)}"
    if dry_run:
        return would(f"free {act}", as_json, contents=found.contents, freed_bytes=found.freed_bytes)
    if as_json:
        return print_json({"contents": found.contents, "freed_bytes": found.freed_bytes})
    say(f"Freed {act}.")


def parse_token(text: str) -> tuple[str, tuple[str, str, tuple[str, ...]]]:
    """(token, (owner, role, organisations)) of one --token.

    Raises:
        ConfigurationError: it is malformed; the text may contain a secret, so it is not repeated.
    """
    owners, separator, secret = text.partition("=")
    owners, _, role = owners.partition(":")
    names = owners.split(",")
    if not (separator and secret and all(names) and role in ("", "read", "write")):
        raise ConfigurationError("A --token is malformed: expected OWNER=TOKEN, ann,team=TOKEN or ann:read=TOKEN.")
    return secret, (names[0], role or "write", tuple(names[1:]))
