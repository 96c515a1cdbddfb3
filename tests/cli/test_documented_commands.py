"""What the pages tell a reader to type is understood by the command line."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from adapterhub_lite.cli.main import build_app
from tests.checkout import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def joined(block: str) -> str:
    """A block with each command on one line, as the shell reads it."""
    return block.replace("\\\n", "")


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in joined(block).splitlines() if line.startswith("adapterhub-lite ")]
    lines += re.findall(r"`(adapterhub-lite \w[^`]*)`", page.read_text())
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page: Path) -> None:
    app = typer.main.get_command(build_app())
    for words in commands(page):
        context = app.make_context("adapterhub-lite", list(words), resilient_parsing=False)
        with context:
            name, verb, rest = app.resolve_command(context, words)  # type: ignore[attr-defined]
            if rest:
                verb.make_context(name, list(rest), parent=context)
