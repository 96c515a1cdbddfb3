"""How long the rows of a data set are for a base's tokenizer: what a plan can know of data before any weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from adapterhub_lite.bases import EMBEDDED_BASES, load_tokenizer, resolve_base
from adapterhub_lite.bases.encoding import end_tokens
from adapterhub_lite.errors import UnknownNameError
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.training.data.preparation import Preparation
from adapterhub_lite.training.data.tokenization import row_lengths
from adapterhub_lite.training.data.vocabulary import with_tokens
from adapterhub_lite.training.settings import DataSettings


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row, and how many rows were cut to the limit."""

    tokens: tuple[int, ...]
    truncated: int

    def of_step(self, rows: int) -> int:
        """Tokens per row of the largest step there can be: the `rows` longest together, laid end to end."""
        longest = sorted(self.tokens, reverse=True)[:rows]
        return max(1, -(-sum(longest) // rows))

    def described(self) -> str:
        """One line for people."""
        cut = f", {self.truncated} cut to the limit" if self.truncated else ""
        return f"{len(self.tokens)} rows: longest {max(self.tokens)} tokens, median {median(self.tokens):.0f}{cut}"


def measure_rows(
    base: str,
    data: Any,
    *,
    max_length: int | None,
    settings: DataSettings | None = None,
    added_tokens: Sequence[str] = (),
) -> RowLengths:
    """Tokenise `data` (as `load_rows` takes it) for `base` (a name, a folder or a Hub id) and count; longer rows are cut.

    `added_tokens` are those that the base has not.

    Raises:
        DataError: the rows cannot be used.
        UnknownNameError: there is no tokenizer under that name.
        BrokenBaseError: it cannot be read.
        ConfigurationError: it has one of the added tokens already.
    """
    tokenizer, ends = tokenizer_of(base)
    tokenizer = with_tokens(tokenizer, added_tokens) if added_tokens else tokenizer
    chosen = replace(settings or DataSettings(), unlearnable="drop")
    preparation = Preparation.for_run(tokenizer, chosen, max_length=max_length, overlong="truncate", ends=ends)
    found = preparation.rows(data)
    return RowLengths(tuple(row_lengths(found.table)), found.truncated)


def tokenizer_of(base: str) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer of a base and the ids that end its answers; no weights are read.

    Raises:
        UnknownNameError: there is no tokenizer under that name.
        BrokenBaseError: it cannot be read.
    """
    made = adapterhub_home() / "bases" / base
    known = str(made) if made.is_dir() else str(resolve_base(base).folder) if base in EMBEDDED_BASES else base
    if Path(known, "config.json").is_file():
        tokenizer = load_tokenizer(known)
        return tokenizer, end_tokens(tokenizer, Path(known))
    try:
        tokenizer = AutoTokenizer.from_pretrained(known, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnknownNameError.among(
            "tokenizer for the base", base, [*EMBEDDED_BASES, str(Path("a folder"))]
        ) from error
    return tokenizer, end_tokens(tokenizer, *generation_configs(known))


def generation_configs(known: str) -> list[Any]:
    """Where the ids that end an answer stand: in a folder, or in a generation config on the Hub."""
    if Path(known).is_dir():
        return [Path(known)]
    try:
        return [GenerationConfig.from_pretrained(known)]
    except OSError:  # a base need not have one
        return []
