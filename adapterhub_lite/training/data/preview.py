"""Rows as they will be learned, token by token: what is learned, what is only seen. A value to draw; draws HTML itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.lengths import tokenizer_of
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.reading.tables import Dataset, column_batches
from adapterhub_lite.training.data.rows import columns_of, load_rows
from adapterhub_lite.training.data.tokenization import (
    IGNORED,
    Fitted,
    Overlong,
    Tokens,
    named_rows,
)
from adapterhub_lite.training.settings import DataSettings

ROWS_AT_A_TIME = 500
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}"
    "pre{white-space:pre-wrap;border:1px solid #bbb;border-radius:6px;padding:.8em;font:14px/1.7 ui-monospace,monospace}"
    "mark{background:#c9f0cf;color:#063d12;border-radius:3px;padding:1px 0}.partly{background:#fdeab5;color:#4a3500}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}mark{background:#14532d;color:#d8ffe1}"
    ".partly{background:#5c4708;color:#fff0c4}pre{border-color:#444}}"
)


@dataclass(frozen=True)
class PreviewToken:
    """One token. `weight` is how much it counts in the loss: 0 where it is only seen."""

    id: int
    text: str
    weight: float


@dataclass(frozen=True)
class PreviewRow:
    """One example as it is trained. `cut` says that it was longer than the limit."""

    where: str
    tokens: tuple[PreviewToken, ...]
    cut: bool = False

    @property
    def learned(self) -> int:
        """How many of the tokens are learned."""
        return sum(token.weight > 0 for token in self.tokens)

    def pieces(self) -> list[tuple[str, float]]:
        """(text, weight) of the stretches of tokens that count alike."""
        found: list[tuple[str, float]] = []
        for token in self.tokens:
            if found and found[-1][1] == token.weight:
                found[-1] = (found[-1][0] + token.text, token.weight)
            else:
                found.append((token.text, token.weight))
        return found


@dataclass(frozen=True)
class RowsPreview:
    """The first rows as they will be learned, and the lengths and the fate of all that were looked at.

    `refused` holds the reasons why rows cannot be trained, at most some; `refusals` counts them all.
    """

    rows: tuple[PreviewRow, ...]
    lengths: tuple[int, ...]
    learned: int
    looked_at: int
    truncated: int
    dropped: int
    refusals: int
    refused: tuple[str, ...]
    layouts: dict[str, int]
    template: str

    def described(self) -> str:
        """A few words for people: lengths, what is learned, what becomes of long rows."""
        if not self.lengths:
            return f"{self.looked_at} rows, none of which can be trained"
        total = sum(self.lengths)
        ways = ", ".join(f"{count} {way}" for way, count in sorted(self.layouts.items()))
        parts = [
            f"{self.looked_at} rows give {len(self.lengths)} examples ({ways})",
            f"longest {max(self.lengths)} tokens, median {median(self.lengths):.0f}",
            f"{self.learned} of {total} tokens are learned",
            f"template: {self.template}",
        ]
        for count, what in ((self.truncated, "cut"), (self.dropped, "dropped"), (self.refusals, "refused")):
            if count:
                parts.append(f"{count} {what}")
        return "; ".join(parts)

    def draw(self) -> None:
        """Print the rows to the terminal: learned tokens in green and in brackets."""
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False, markup=False)
        for row in self.rows:
            cut = ", cut to the limit" if row.cut else ""
            console.print(f"{row.where}: {len(row.tokens)} tokens, {row.learned} learned{cut}", style="bold")
            text = Text()
            for piece, weight in row.pieces():
                # Without colour the brackets say it; a weight other than 1 is written out.
                before, after = ("⟦", "⟧" if weight == 1 else f"⟧×{weight:g}") if weight else ("", "")
                text.append(before + piece + after, style="green" if weight else "dim")
            console.print(text, "", sep="\n", soft_wrap=True)
        for reason in self.refused:
            console.print(f"refused: {reason}", soft_wrap=True)
        console.print(f"{self.described()}.\n⟦…⟧ is learned, the rest is only seen.", soft_wrap=True)

    def as_json(self) -> dict[str, Any]:
        """The picture as values for JSON."""
        return {
            "rows": [
                {
                    "where": row.where,
                    "cut": row.cut,
                    "learned": row.learned,
                    "tokens": [{"id": t.id, "text": t.text, "weight": t.weight} for t in row.tokens],
                }
                for row in self.rows
            ],
            "looked_at": self.looked_at,
            "examples": len(self.lengths),
            "longest": max(self.lengths, default=0),
            "median": median(self.lengths) if self.lengths else 0,
            "tokens": sum(self.lengths),
            "learned": self.learned,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "refusals": self.refusals,
            "refused": list(self.refused),
            "layouts": self.layouts,
            "template": self.template,
        }

    def as_html(self) -> str:
        """A page of its own: learned tokens are marked, what counts other than 1 says how much."""
        parts = []
        for row in self.rows:
            body = "".join(
                escape(text)
                if not weight
                else f"<mark{'' if weight == 1 else f' class=partly title=weight&#32;{weight:g}'}>{escape(text)}</mark>"
                for text, weight in row.pieces()
            )
            cut = ", cut to the limit" if row.cut else ""
            head = f"{escape(row.where)}: {len(row.tokens)} tokens, {row.learned} learned{cut}"
            parts.append(f"<h2>{head}</h2>\n<pre>{body}</pre>")
        refused = "".join(f"<li>{escape(reason)}</li>" for reason in self.refused)
        refusals = f"<h2>Refused</h2><ul>{refused}</ul>" if refused else ""
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Rows as they are learned</title>'
            f"<style>{STYLE}</style><h1>Rows as they are learned</h1><p>{escape(self.described())}. "
            "<mark>Marked</mark> is learned, the rest is only seen.</p>\n" + "\n".join(parts) + refusals + "</html>\n"
        )


def preview_rows(
    rows: Dataset,
    preparation: Preparation,
    *,
    shown: int = 3,
    most: int = 10_000,
    template: str = "the tokenizer's own",
) -> RowsPreview:
    """Look at up to `most` rows of a table that `load_rows` made, and keep the first `shown` examples to be drawn.

    A row that cannot be trained is counted, and does not end the look.
    """
    fitted, maker = Fitted(preparation.limits), preparation.maker()
    kept: list[PreviewRow] = []
    lengths: list[int] = []
    refused: list[str] = []
    learned = refusals = 0
    looked = rows.select(range(min(most, len(rows))))
    for batch in column_batches(looked, ROWS_AT_A_TIME):
        for row in named_rows(batch):
            try:
                examples = [
                    (where, tokens, list(fitted.fit([(where, tokens)]))) for where, tokens in maker.examples([row])
                ]
            except DataError as error:
                refusals += 1
                refused += [str(error)] if len(refused) < shown else []
                continue
            for where, tokens, left in examples:
                for one in left:
                    lengths.append(len(one.ids))
                    learned += sum(label != IGNORED for label in one.labels)
                    if len(kept) < shown:
                        kept.append(
                            PreviewRow(where, _drawn(preparation.tokenizer, one), len(one.ids) < len(tokens.ids))
                        )
    return RowsPreview(
        tuple(kept), tuple(lengths), learned, len(looked), fitted.truncated, fitted.dropped, refusals, tuple(refused),
        dict(maker.ways), template,
    )  # fmt: skip


def _drawn(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> tuple[PreviewToken, ...]:
    return tuple(
        PreviewToken(token, text, 0.0 if label == IGNORED else weight)
        for token, text, label, weight in zip(
            tokens.ids, token_texts(tokenizer, tokens.ids), tokens.labels, tokens.weights, strict=True
        )
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, which together are the text of all; a character of several tokens stands at its last."""
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = (
            str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False)) for stop in (read, end)
        )
        if now.endswith("\ufffd"):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, read = read, end
    return texts


def preview_of(
    data: str, base: str, settings: DataSettings, *, max_length: int, overlong: Overlong = "refuse", shown: int = 3
) -> RowsPreview:
    """`preview_rows` of `data` for a base by name, folder or Hub id; of the base only its tokenizer is read.

    Raises:
        DataError: the rows cannot be read.
        UnknownNameError: there is no tokenizer under that name.
    """
    config = settings.data_config or None
    rows = load_rows(data, split=settings.data_split, config=config, columns=columns_of(settings))
    tokenizer, ends = tokenizer_of(base)
    preparation = Preparation.for_run(tokenizer, settings, max_length=max_length, overlong=overlong, ends=ends)
    named = Path(settings.chat_template).name if settings.chat_template else f"that of {base}"
    return preview_rows(rows, preparation, shown=shown, template=named)
