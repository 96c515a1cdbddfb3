"""How long the rows of a data set are for a base's tokenizer: what a plan can know of data before any weights are read."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from adapterhub_lite.errors import UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import row_lengths, tokenize_rows


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row, and how many rows were cut to the limit."""

    tokens: tuple[int, ...]
    truncated: int

    def of_step(self, rows: int) -> int:
        """Tokens a row of the largest step there can be: the `rows` longest together, laid end to end."""
        longest = sorted(self.tokens, reverse=True)[:rows]
        return max(1, -(-sum(longest) // rows))

    def described(self) -> str:
        """One line for people."""
        cut = f", {self.truncated} cut to the limit" if self.truncated else ""
        return f"{len(self.tokens)} rows: longest {max(self.tokens)} tokens, median {median(self.tokens):.0f}{cut}"


def measure_rows(base: str, data: str, *, max_length: int) -> RowLengths:
    """Tokenise `data` (as `load_rows` takes it) for `base` (a name, a folder or a Hub id) and count.

    Raises:
        DataError: the rows cannot be used.
        UnknownNameError: there is no tokenizer under that name.
    """
    found = tokenize_rows(load_rows(data), _tokenizer(base), max_length=max_length, overlong="truncate")
    return RowLengths(tuple(row_lengths(found.table)), found.truncated)


def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    from adapterhub_lite.bases import EMBEDDED_BASES, resolve_base

    made = adapterhub_home() / "bases" / base
    known = str(made) if made.is_dir() else str(resolve_base(base).folder) if base in EMBEDDED_BASES else base
    try:
        return AutoTokenizer.from_pretrained(known, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnknownNameError.among(
            "tokenizer for the base", base, [*EMBEDDED_BASES, str(Path("a folder"))]
        ) from error
