"""Starts the app on this machine: chooses the port, restricts what browsers may load, prints the address."""

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapterhub_app.access import Access
from adapterhub_app.demo import build_demo
from adapterhub_app.opening import Opening
from adapterhub_app.theme import STYLE_SHEET, build_theme
from adapterhub_app.training import MOST_FILE_BYTES
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import AdapterHubError, ResourceError, UsageError
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.serving import InferenceEngine
from adapterhub_lite.web.guard import BrowserGuard, plain_refusal

DEFAULT_PORT = 7860
PORTS_TRIED = 100
LAST_PORT = 65_535
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Gradio's own page needs inline scripts and styles, and its charts compile their specification.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


# Gradio's own doors for files: rows to train on, and adapters to add.
UPLOADS = "/upload"
# Gradio's cookie of somebody who has logged in begins so.
LOGIN_COOKIE = "access-token"


class SecurityHeaders:
    """ASGI middleware: adds `HEADERS` to every answer, and takes files from admins only. Plain, so streams are not buffered."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    def takes_files(self, scope: Scope) -> bool:
        """Whether who asks may give files to this page."""
        if not self.access.has_login:
            return self.access.open_role == "admin"
        cookies = cookie_parser(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
        tokens = getattr(scope.get("app"), "tokens", {})
        names = [tokens.get(value) for name, value in cookies.items() if name.startswith(LOGIN_COOKIE)]
        return any(name is not None and self.access.role_of(name) == "admin" for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        if scope["type"] == "http" and UPLOADS in scope["path"] and not self.takes_files(scope):
            return await plain_refusal(403, "This page takes files from admins only.")(
                scope, receive, send_with_headers
            )
        await self.app(scope, receive, send_with_headers)


@dataclass(frozen=True)
class RunningApp:
    """An app being served at `url`; `close()` stops it and leaves the engine running."""

    url: str
    demo: gr.Blocks

    def close(self) -> None:
        """Stop serving and free the port."""
        self.demo.close(verbose=False)


def launch(
    engine: InferenceEngine,
    registry: AdapterRegistry,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    base_name: str | None = None,
    base: ResolvedBase | None = None,
    access: Access | None = None,
    hub: str | None = None,
    hosts: Sequence[str] = (),
    frame_ancestors: Sequence[str] = (),
    block: bool = True,
) -> RunningApp:
    """Serve the app and print its address. With `block`, return only when interrupted.

    `port` None means 7860 or the next free one. `hosts` are names under which it is reached besides addresses and
    localhost; requests to other names, and from pages of other sites, are refused. `frame_ancestors` may show it in a
    frame. The other settings are those of `build_demo`.

    Raises:
        ResourceError: the port asked for, or every port tried, is in use.
    """
    access = access or Access()
    free_port(host, port)  # before the page is built, which takes a second

    async def start() -> tuple[gr.Blocks, int]:
        demo = build_demo(engine, registry, base_name=base_name, base=base, access=access, hub=hub)
        guard = Middleware(BrowserGuard, hosts=(host, *hosts), frame_ancestors=frame_ancestors)
        chosen = free_port(host, port)  # a second is long enough for another program to take one
        start_server(demo, host, chosen, access, guard)
        return demo, chosen

    # Gradio creates its locks in the running event loop; without one it opens a loop for each and never closes it.
    with ThreadPoolExecutor(1, "app-start") as starter:
        demo, chosen = starter.submit(asyncio.run, start()).result()
    everywhere = host in ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
    running = RunningApp(url=f"http://{'127.0.0.1' if everywhere else host}:{chosen}/", demo=demo)
    moved = f" (port {DEFAULT_PORT} is in use)" if port is None and chosen != DEFAULT_PORT else ""
    print(f"adapterhub-lite is at {running.url}{moved}", flush=True)
    if block:
        demo.block_thread()
    return running


def start_server(demo: gr.Blocks, host: str, port: int, access: Access, guard: Middleware) -> None:
    """Start Gradio's server with every feature off that the page does not need: sharing, API, monitoring, MCP.

    Raises:
        ResourceError: the port was taken after it was found free.
    """
    demo.queue(default_concurrency_limit=None, api_open=False)
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            auth=access.check if access.has_login else None,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            app_kwargs={"middleware": [guard, Middleware(SecurityHeaders, access=access), Middleware(Opening)]},
            max_file_size=MOST_FILE_BYTES,
            theme=build_theme(),
            css_paths=STYLE_SHEET,
        )
    except OSError as error:
        raise ResourceError(
            f"Port {port} on {host} was taken by another program in the meantime. Start again."
        ) from error


def free_port(host: str, port: int | None) -> int:
    """Return `port` if it is free, or for None the first free port from 7860 upwards; 0 lets the system choose.

    Raises:
        ResourceError: the port, or every port tried, is in use.
    """
    if port is not None and not 0 <= port <= LAST_PORT:
        raise ResourceError(f"Port {port} does not exist: expected 0 (any free port) to {LAST_PORT}.")
    candidates = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else (port,)
    for candidate in candidates:
        with socket.socket() as probe:
            # As the server does: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    tried = f"Ports {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} are" if port is None else f"Port {port} is"
    raise ResourceError(f"{tried} in use on {host}. Stop the other program, or give another port.")


def serve(
    base: str,
    *,
    home: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    users: str | Path | None = None,
    hub: str | None = None,
    allowed_hosts: str = "",
    loading: AbstractContextManager[object] | None = None,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Load `base` and serve the app over the registry at `home` until it is interrupted.

    `users` is a file of logins (see `Access.read`), `hub` the endpoint to push to and pull from,
    `allowed_hosts` names under which the page is reached, separated by commas. `tell` hears what is being done (None: standard error), and
    `loading` is entered while the base is loaded.

    Raises:
        UsageError: `host` is reachable from other machines, and no login is required.
        AdapterHubError: the base is unknown, no port is free, or the logins cannot be read.
    """
    if users is None and host not in LOOPBACK:
        raise UsageError(
            f"On {host} other people could promote and push. Give a file of logins with --users, or leave out --host."
        )
    access = Access.read(users) if users else Access()
    free_port(host, port)  # before the base is loaded, which takes longer
    tell = tell or (lambda text: print(text, file=sys.stderr, flush=True))
    tell(f"Loading {base}; the address of the page follows.")
    with loading or nullcontext():
        registry, resolved = AdapterRegistry(home), resolve_base(base, home=home, progress=tell)
        loaded = InferenceEngine.from_base(base, registry=registry, home=home)
    with loaded as engine:
        named = Path(resolved.name).name
        launch(
            engine, registry, host=host, port=port, base_name=named, base=resolved, access=access, hub=hub,
            hosts=allowed_hosts.split(","),
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the app from the command line (`python -m adapterhub_app`). Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m adapterhub_app", description=main.__doc__)
    parser.add_argument(
        "--base", default=os.environ.get("ADAPTERHUB_BASE", "smollm2-135m"), help="base model name or folder"
    )
    parser.add_argument("--home", default=None, help="registry home; default $ADAPTERHUB_HOME or ~/.adapterhub-lite")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=None, help="port; default 7860 or the next free one")
    parser.add_argument("--users", default=None, help="JSON file of logins with their roles; default no login")
    parser.add_argument("--hub", default=None, help="endpoint of the hub to push to and pull from")
    parser.add_argument("--allowed-hosts", default="", help="names under which it is reached, separated by commas")
    chosen = parser.parse_args(arguments)
    try:
        serve(**vars(chosen))
    except AdapterHubError as error:
        parser.exit(2, f"{error}\n")
    return 0
