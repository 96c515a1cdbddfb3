"""The entry point `adapterhub-lite`: registers the verbs and turns errors into one sentence and an exit code."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from adapterhub_lite.cli.keep.aliases import alias, history, rollback
from adapterhub_lite.cli.keep.merge import merge
from adapterhub_lite.cli.keep.show import diff, list_adapters, show
from adapterhub_lite.cli.keep.sign import keygen, sign, trust, verify
from adapterhub_lite.cli.keep.versions import add, gc, pin, remove, unpin
from adapterhub_lite.cli.machine import bench, doctor
from adapterhub_lite.cli.serve.demo import demo
from adapterhub_lite.cli.serve.serve import serve
from adapterhub_lite.cli.share.export import export
from adapterhub_lite.cli.share.hub import hub
from adapterhub_lite.cli.share.lock import lock
from adapterhub_lite.cli.share.push_pull import pull, push
from adapterhub_lite.cli.train.evaluate import evaluate
from adapterhub_lite.cli.train.plan import plan
from adapterhub_lite.cli.train.preview import preview
from adapterhub_lite.cli.train.sweep import sweep
from adapterhub_lite.cli.train.train import train
from adapterhub_lite.errors import AdapterHubError, RunStoppedError
from adapterhub_lite.quiet import quiet_libraries

VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "preview": preview,
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "add": add,
    "list": list_adapters,
    "show": show,
    "diff": diff,
    "alias": alias,
    "rollback": rollback,
    "history": history,
    "pin": pin,
    "unpin": unpin,
    "remove": remove,
    "gc": gc,
    "push": push,
    "pull": pull,
    "lock": lock,
    "keygen": keygen,
    "sign": sign,
    "verify": verify,
    "trust": trust,
    "merge": merge,
    "export": export,
    "serve": serve,
    "demo": demo,
    "hub": hub,
    "doctor": doctor,
    "bench": bench,
}
# How `--help` groups them.
PANELS = {
    "Train": ("preview", "plan", "train", "sweep", "eval"),
    "Keep": ("add", "list", "show", "diff", "alias", "rollback", "history", "pin", "unpin", "remove", "gc"),
    "Share": ("push", "pull", "lock", "hub"),
    "Sign": ("keygen", "sign", "verify", "trust"),
    "Serve": ("serve", "demo", "merge", "export"),
    "This machine": ("doctor", "bench"),
}


def build_app() -> typer.Typer:
    """Return the Typer application with every verb registered."""
    app = typer.Typer(
        name="adapterhub-lite",
        help="Train small LoRA adapters, keep every version with its proof, share them, serve them from one base.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
    )

    @app.callback()
    def root(
        show_version: Annotated[
            bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        if show_version:
            typer.echo(version("adapterhub-lite"))
            raise typer.Exit

    panel = {name: title for title, names in PANELS.items() for name in names}
    for name, verb in VERBS.items():
        app.command(name, rich_help_panel=panel[name])(verb)
    return app


def main() -> None:
    """Run the command line; a known error is one sentence on standard error and exit code 2, never a traceback."""
    quiet_libraries()
    try:
        build_app()()
    except RunStoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(str(stopped), err=True)
        sys.exit(128 + stopped.signal)
    except AdapterHubError as error:
        # Of several processes that find the same mistake, only one reports it.
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this code.
        if ended.code == 130:
            typer.echo("Interrupted.", err=True)
        raise
