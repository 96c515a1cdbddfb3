"""`preview`: the first rows as they will be learned, before any model is read."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adapterhub_lite.cli.options import build_settings, options_from
from adapterhub_lite.cli.output import JsonOption, print_json
from adapterhub_lite.errors import ConfigurationError, DataError
from adapterhub_lite.training.settings import DataSettings


@options_from(DataSettings)
def preview(
    data: Annotated[
        str, typer.Argument(help="A JSONL, JSON, CSV or parquet file, a folder, or a data set on the Hub.")
    ],
    given: dict[str, Any],
    base: Annotated[str, typer.Option(help="Base model: an embedded name, a folder or a Hub id.")] = "smollm2-135m",
    rows: Annotated[int, typer.Option(min=0, max=1000, help="So many examples are shown.")] = 3,
    max_length: Annotated[int, typer.Option(min=2, help="Longest row, in tokens.")] = 1024,
    overlong: Annotated[
        Literal["refuse", "truncate", "truncate_start", "drop"],
        typer.Option(help="A longer row: refuse, truncate (its end), truncate_start or drop."),
    ] = "refuse",
    html: Annotated[Path | None, typer.Option(help="Also draw the rows into this page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as they will be learned, token by token, with lengths and what is cut or refused.

    Example: `adapterhub-lite preview questions.csv --base smollm2-135m --html rows.html`
    """
    from adapterhub_lite.training.data.preview import preview_of

    settings = build_settings(DataSettings, given, None)
    found = preview_of(data, base, settings, max_length=max_length, overlong=overlong, shown=rows)
    if html is not None:
        try:
            html.write_text(found.as_html(), encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"{html} cannot be written: {error.strerror}.") from error
    if as_json:
        print_json(found.as_json())
    else:
        found.draw()
    if not found.lengths:
        raise DataError(found.refused[0] if found.refused else "No row can be trained.")
