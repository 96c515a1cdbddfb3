"""What a run's tokenizer may have that its base has not: a template, and tokens. Both travel with the adapter.

An adapter is served on its base, by the base's own tokenizer and embedding: what differs is looked at before the first step.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.added_tokens import (
    ADDED_TOKENS_FILE,
    AddedTokens,
    tokenizer_with,
    tokens_beyond,
)
from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.bases.broken import read_object
from adapterhub_lite.bases.chat.template import TEMPLATE_FILE, template_digest
from adapterhub_lite.bases.encoding import tokens_around
from adapterhub_lite.errors import ConfigurationError

WAY_OUT = (
    "Save model and tokenizer together as a base of its own (save_pretrained of both to one folder), and train on that "
    "folder."
)


def with_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` that has these texts as tokens, found wherever they stand and shown in answers.

    Raises:
        ConfigurationError: it has one of them already.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    if there := [text for text in texts if text in known]:
        raise ConfigurationError(
            f"added_tokens has {', '.join(map(repr, there[:3]))}, which the tokenizer has already: leave it out."
        )
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return changed


def new_tokens(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, name: str = "the base"
) -> AddedTokens | None:
    """The tokens that `tokenizer` has beyond `own`, that of the base called `name`; None without any.

    Raises:
        ConfigurationError: they could not travel with an adapter, or it differs otherwise.
    """
    known, found = own.get_vocab(), tokenizer.get_vocab()
    if found == known:
        return None
    try:
        added = tokens_beyond(tokenizer, known)
        if added is not None and tokenizer_with(added, own).get_vocab() == found:
            return added
        problem = f"It has other tokens than that of {name}, and not only new ones behind them."
    except ValueError as error:
        problem = f"{error}."
    raise ConfigurationError(
        f"The tokenizer cannot be used with an adapter, which is served with its base's: {problem} {WAY_OUT}"
    )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, base: ResolvedBase | None, model: Any, before: PreTrainedTokenizerBase
) -> AddedTokens | None:
    """The tokens of a run that its base has not, which its adapter will bring along; None without any.

    `model` is the one in memory, or None where it is still to be read from `base`; `before` is the tokenizer before the
    run's own tokens were added, from which they are told where the base is not known.

    Raises:
        ConfigurationError: tokenizer or embedding were changed in a way that cannot travel with an adapter.
    """
    own = before if base is None else load_tokenizer(base.folder)
    added = new_tokens(tokenizer, own, "the model" if base is None else base.name)
    if tokens_around(tokenizer)[0] != tokens_around(own)[0]:
        raise ConfigurationError(
            f"The tokenizer puts other tokens before a text than that of {base.name if base else 'the model'}, which the "
            f"adapter is served with. Take the base's setting (add_bos_token). {WAY_OUT}"
        )
    rows = embedding_rows(base.folder) if base is not None else None
    # A sharded parameter shows no rows at all before it is gathered.
    here = model.get_input_embeddings().weight.shape[0] if model is not None else 0
    if base is not None and here and rows is not None:
        _check_rows(here, rows, rows_with(added, rows), base.name)
    if added is not None and isinstance(model, PeftModel) and here < rows_with(added, here):
        raise ConfigurationError(
            f"The model has {here} rows for tokens, and the tokenizer has more. Resize it before it gets its adapter: "
            "model.resize_token_embeddings(len(tokenizer)), then get_peft_model."
        )
    return added


def _check_rows(here: int, rows: int, needed: int, name: str) -> None:
    if here < rows:
        raise ConfigurationError(
            f"The model's embedding has {here} rows, that of {name} {rows}: resizing took rows away. The base has rows for "
            "more tokens than its tokenizer: load it anew and leave its size, new tokens take the rows that are there."
        )
    if here not in (rows, needed):
        raise ConfigurationError(
            f"The model's embedding has {here} rows, and {name} with the run's tokens needs {needed}. Give the tokenizer "
            "that has the new tokens as processing_class, and resize the model to len(tokenizer), without "
            f"pad_to_multiple_of. {WAY_OUT}"
        )


def rows_with(added: AddedTokens | None, rows: int) -> int:
    """The rows that an embedding of so many rows has with these tokens."""
    return max(rows, added.tokens[-1].id + 1) if added is not None else rows


def embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding of the base in a folder, where its configuration says so."""
    config = read_object(folder / "config.json")
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return rows if isinstance(rows, int) else None


def write_words(
    tokenizer: PreTrainedTokenizerBase, base: ResolvedBase | None, added: AddedTokens | None, folder: Path
) -> None:
    """Put the run's chat template, where it is not the base's own, and its `added` tokens beside its adapter."""
    if added is not None:
        (folder / ADDED_TOKENS_FILE).write_bytes(added.to_bytes())
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        return
    if base is None or template_digest(load_tokenizer(base.folder)) != template_digest(tokenizer):
        (folder / TEMPLATE_FILE).write_bytes(template.encode())
