"""The entry point `adapterhub-lite`: registers the verbs and turns errors into one sentence and an exit code."""

import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from adapterhub_lite import __version__
from adapterhub_lite.cli.keep.aliases import alias, history, rollback
from adapterhub_lite.cli.keep.backup import backup, restore
from adapterhub_lite.cli.keep.merge import merge
from adapterhub_lite.cli.keep.show import diff, list_adapters, show
from adapterhub_lite.cli.keep.sign import keygen, sign, trust, verify
from adapterhub_lite.cli.keep.versions import add, gc, pin, remove, unpin
from adapterhub_lite.cli.machine import bench, doctor
from adapterhub_lite.cli.serve.ask import ask
from adapterhub_lite.cli.serve.demo import demo
from adapterhub_lite.cli.serve.serve import serve
from adapterhub_lite.cli.share.export import export
from adapterhub_lite.cli.share.hub import hub
from adapterhub_lite.cli.share.lock import lock
from adapterhub_lite.cli.share.push_pull import pull, push
from adapterhub_lite.cli.train.evaluate import evaluate
from adapterhub_lite.cli.train.plan import plan
from adapterhub_lite.cli.train.preview import preview
from adapterhub_lite.cli.train.runs import runs
from adapterhub_lite.cli.train.sweep import sweep
from adapterhub_lite.cli.train.train import train
from adapterhub_lite.errors import AdapterHubError, RunStoppedError
from adapterhub_lite.installation import explain_missing
from adapterhub_lite.quiet import quiet_libraries

VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "preview": preview,
    "train": train,
    "sweep": sweep,
    "runs": runs,
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
    "backup": backup,
    "restore": restore,
    "push": push,
    "pull": pull,
    "lock": lock,
    "keygen": keygen,
    "sign": sign,
    "verify": verify,
    "trust": trust,
    "merge": merge,
    "export": export,
    "ask": ask,
    "serve": serve,
    "demo": demo,
    "hub": hub,
    "doctor": doctor,
    "bench": bench,
}
# Columns that the table of options needs for the longest of them.
WIDE = 120
# How `--help` groups them.
PANELS = {
    "Train": ("preview", "plan", "train", "sweep", "runs", "eval"),
    "Keep": (
        "add",
        "list",
        "show",
        "diff",
        "alias",
        "rollback",
        "history",
        "pin",
        "unpin",
        "remove",
        "gc",
        "backup",
        "restore",
    ),
    "Share": ("push", "pull", "lock", "hub"),
    "Sign": ("keygen", "sign", "verify", "trust"),
    "Serve": ("ask", "serve", "demo", "merge", "export"),
    "This machine": ("doctor", "bench"),
}


class Verb(TyperCommand):
    """A command whose help is not a table where the terminal is too narrow for one, which would cut names of options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # Any: Typer's own copies of Click's types
        """Write the help into `formatter`."""
        if shutil.get_terminal_size().columns < WIDE:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)


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
            bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    panel = {name: title for title, names in PANELS.items() for name in names}
    for name, verb in VERBS.items():
        app.command(name, cls=Verb, rich_help_panel=panel[name])(verb)
    return app


def in_options(text: str, arguments: Sequence[str]) -> str:
    """An error of the package in words of the command line: `prompt_column` is `--prompt-column` to who typed options.

    Who gave a file of settings reads their names as they are there.
    """
    verb = VERBS.get(arguments[0]) if arguments else None
    if verb is None or any(word.partition("=")[0] == "--config" for word in arguments):
        return text
    names = [name for name in inspect.signature(verb).parameters if "_" in name]
    return re.sub(
        rf"(?<![\w./\-])({'|'.join(names) or '(?!)'})(?![\w/(])", lambda found: "--" + found[1].replace("_", "-"), text
    )


def print_version(wanted: bool) -> None:
    """Print the version and end, where that is asked for."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a known error is one sentence on standard error and exit code 2, never a traceback."""
    quiet_libraries()
    try:
        build_app()()
    except RunStoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(str(stopped), err=True)
        sys.exit(128 + stopped.signal)
    except ModuleNotFoundError as error:
        explained = explain_missing(error, "This command")
        if explained is None:
            raise
        typer.echo(f"Error: {explained}", err=True)
        sys.exit(2)
    except AdapterHubError as error:
        # Of several processes that find the same mistake, only one reports it.
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"Error: {in_options(str(error), sys.argv[1:])}", err=True)
        sys.exit(2)
    except SystemExit as ended:
        # Typer turns Ctrl-C into this code.
        if ended.code == 130:
            typer.echo("Interrupted.", err=True)
        raise
