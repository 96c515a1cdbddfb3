"""How every verb reports: a rich table for people, one JSON document with `--json`, progress on standard error."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

SECONDS_BETWEEN_LINES = 10.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check what can be checked, report what would be done, and change nothing.")
]
DescriptionOption = Annotated[
    str | None, typer.Option("--description", help="What the adapter does, in a few words.", show_default=False)
]
ExampleOption = Annotated[
    list[str] | None, typer.Option("--example", help="A prompt to try it with, for its card; may be repeated.")
]
SchemaOption = Annotated[
    Path | None, typer.Option("--schema", help="A file with the JSON schema that its answers follow.")
]
HomeOption = Annotated[
    str | None,
    typer.Option("--home", help="Where adapters and bases are kept.", envvar="ADAPTERHUB_HOME", show_default=False),
]


def print_json(payload: Any) -> None:
    """Print `payload` as one JSON document on standard output."""
    typer.echo(json.dumps(payload, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, names: bool = True) -> None:
    """Print rows under a title; colours only on a terminal. Cell texts are data and are never read as markup.

    The first column names the row and stays on one line, unless `names` is false.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    # At least as wide as its title, which would otherwise be wrapped.
    table = Table(
        title=escape(title), title_justify="left", header_style="bold", min_width=min(len(title), console.width)
    )
    for number, column in enumerate(columns):
        # On a narrow terminal the others wrap. Nothing is truncated, because a cell may be a command to copy.
        table.add_column(column, no_wrap=names and number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def say(text: str) -> None:
    """Inform the user on standard error, so that `--json` output stays clean."""
    typer.echo(text, err=True)


def would(act: str, as_json: bool, **facts: Any) -> None:
    """Report a dry run: `act` is what would have been done, as in `push sql:3 to org/sql`."""
    if as_json:
        return print_json({"dry_run": True, "would": act, **facts})
    say(f"Would {act}. Nothing was changed.")


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on standard error during slow work, and yield what changes its text.

    Where standard error is no terminal there is a line every `SECONDS_BETWEEN_LINES` instead.
    """
    from rich.console import Console

    console, now = Console(stderr=True), [text]
    if console.is_terminal:
        with console.status(text) as status:
            yield lambda words: status.update(words)
        return
    ended, began = threading.Event(), time.monotonic()

    def say_now_and_then() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            say(f"{now[0]}, {time.monotonic() - began:.0f} s")

    threading.Thread(target=say_now_and_then, name="waiting", daemon=True).start()
    try:
        yield lambda words: now.__setitem__(0, words)
    finally:
        ended.set()


def short(digest: str) -> str:
    """The first twelve hex digits of a digest, enough for people to compare."""
    return digest.removeprefix("sha256:")[:12]


def megabytes(size: int) -> str:
    """A number of bytes, in MB."""
    return f"{size / 1e6:.1f} MB"


def shown_number(value: float | None) -> str:
    """A measured value with four significant digits."""
    return "not measured" if value is None else f"{value:.4g}"
