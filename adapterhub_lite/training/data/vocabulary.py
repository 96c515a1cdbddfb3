"""What a run's tokenizer may have that its base has not: a template travels with the adapter, new tokens cannot.

An adapter is served on its base, by the base's own tokenizer and embedding. Both are looked at before the first step.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases import ResolvedBase, load_tokenizer
from adapterhub_lite.bases.chat_template import TEMPLATE_FILE, template_digest
from adapterhub_lite.bases.encoding import tokens_around
from adapterhub_lite.errors import ConfigurationError

WAY_OUT = (
    "Save model and tokenizer together as a base of its own (save_pretrained of both to one folder), and train on that "
    "folder."
)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, base: ResolvedBase | None, model: Any) -> None:
    """Refuse tokens that the base has not: they would be lost with the run's tokenizer and embedding.

    `model` is the one in memory, or None where it is still to be read from `base`.

    Raises:
        ConfigurationError: the tokenizer or the embedding was changed.
    """
    if base is None:
        return
    own = load_tokenizer(base.folder)
    known, found = own.get_vocab(), tokenizer.get_vocab()
    if found != known:
        added = sorted(set(found) - set(known), key=lambda token: found[token])
        what = f"has {len(added)} tokens that {base.name} has not ({', '.join(map(repr, added[:3]))})" if added else ""
        raise ConfigurationError(
            f"The tokenizer {what or f'has other tokens than that of {base.name}'}. An adapter is served with its base's "
            f"tokenizer, so they would be lost. {WAY_OUT}"
        )
    if tokens_around(tokenizer)[0] != tokens_around(own)[0]:
        raise ConfigurationError(
            f"The tokenizer puts other tokens before a text than that of {base.name}, which the adapter is served with. "
            f"Take the base's setting (add_bos_token). {WAY_OUT}"
        )
    rows = embedding_rows(base.folder)
    if model is not None and rows is not None:
        here = model.get_input_embeddings().weight.shape[0]
        # A sharded parameter shows no rows at all before it is gathered.
        if here not in (0, rows):
            raise ConfigurationError(
                f"The model's embedding has {here} rows, that of {base.name} {rows}: it was resized. An adapter is served "
                f"on its base, so the other rows would be lost. {WAY_OUT}"
            )


def embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding of the base in a folder, where its configuration says so."""
    config = json.loads((folder / "config.json").read_bytes())
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return rows if isinstance(rows, int) else None


def write_template(tokenizer: PreTrainedTokenizerBase, base: ResolvedBase | None, folder: Path) -> None:
    """Put the run's chat template beside its adapter, where it is not the base's own."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not template:
        return
    if base is None or template_digest(load_tokenizer(base.folder)) != template_digest(tokenizer):
        (folder / TEMPLATE_FILE).write_bytes(template.encode())
