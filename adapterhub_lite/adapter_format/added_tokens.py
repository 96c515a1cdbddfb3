"""Tokens that an adapter has and its base's tokenizer has not: their texts, in a small file of the adapter's own.

Their rows are in its weights. Nothing else of a stranger's tokenizer is used: it may normalise, split or template in any
way, and what its base encodes must not change. `added_tokens_of` takes the texts out of a `tokenizer.json`;
`tokens_beyond` those of a tokenizer in memory; `tokenizer_with` gives them to the base's tokenizer, which has to number them
as the adapter does.
"""

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from adapterhub_lite.adapter_format.strict_reading import StrictModel, strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADDED_TOKENS_FILE = "adapter_tokens.json"
MAX_ADDED_TOKENS = 10_000
MAX_ADDED_BYTES = 4 << 20
TOKENIZER_FILE = "tokenizer.json"
# Those of vocabularies of 260,000 tokens have half as many bytes.
MAX_TOKENIZER_BYTES = 64 << 20

TokenId = Annotated[int, Field(ge=0, lt=1 << 24)]
TokenText = Annotated[str, Field(min_length=1, max_length=256)]


class AddedToken(StrictModel):
    """One token, with what decides where in a text it is found, as `tokenizers.AddedToken` means it."""

    id: TokenId
    content: TokenText
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class AddedTokens(StrictModel):
    """All of them, by id; no id and no text is there twice."""

    tokens: Annotated[tuple[AddedToken, ...], Field(min_length=1, max_length=MAX_ADDED_TOKENS)]

    def to_bytes(self) -> bytes:
        """The bytes of the file: canonical, so that equal tokens are equal files."""
        found = self.model_dump(mode="json")
        return (json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_added_tokens(content: bytes) -> AddedTokens:
    """Read the bytes of the file.

    Raises:
        ValueError: they are not such a file; the text says why.
    """
    strict_json(content, what=ADDED_TOKENS_FILE, limit=MAX_ADDED_BYTES)
    try:
        found = AddedTokens.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{ADDED_TOKENS_FILE} is no list of tokens: {where}: {first['msg']}") from None
    ids, texts = [token.id for token in found.tokens], {token.content for token in found.tokens}
    if ids != sorted(set(ids)) or len(texts) < len(ids):
        raise ValueError(f"{ADDED_TOKENS_FILE} has a token twice, or not in the order of their ids")
    return found


def added_tokens_of(tokenizer: Path, known: Collection[str]) -> AddedTokens | None:
    """The tokens of a `tokenizer.json` that are not among the texts `known` to the base; None without any.

    Raises:
        ValueError: the file cannot be read as one, or has too many.
    """
    if tokenizer.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{TOKENIZER_FILE} has more than {MAX_TOKENIZER_BYTES} bytes")
    listed = strict_json(tokenizer.read_bytes(), what=TOKENIZER_FILE, limit=MAX_TOKENIZER_BYTES).get("added_tokens")
    found = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    new = [{key: one.get(key) for key in AddedToken.model_fields} for one in found if one.get("content") not in known]
    if not new:
        return None
    new.sort(key=lambda one: one["id"] if isinstance(one["id"], int) else -1)
    return read_added_tokens(json.dumps({"tokens": new}).encode())


def tokens_beyond(tokenizer: "PreTrainedTokenizerBase", known: Collection[str]) -> AddedTokens | None:
    """The tokens of a tokenizer in memory that are not among the texts `known` to the base; None without any.

    Raises:
        ValueError: there are too many, or one has no text, or one of more than 256 characters.
    """
    new = [
        {"id": token_id, **{name: getattr(token, name) for name in AddedToken.model_fields if name != "id"}}
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.content not in known
    ]
    return read_added_tokens(json.dumps({"tokens": new}).encode()) if new else None


def tokenizer_with(added: AddedTokens, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A copy of a base's tokenizer that has these tokens too.

    Raises:
        ValueError: it has them already, or numbers them otherwise.
    """
    from tokenizers import AddedToken as Plain

    changed = copy.deepcopy(tokenizer)
    known: Mapping[str, int] = changed.get_vocab()
    if there := [token.content for token in added.tokens if token.content in known]:
        raise ValueError(f"the base's tokenizer has {there[0]!r:.80} already")
    changed.add_tokens([Plain(token.content, **token.model_dump(exclude={"id", "content"})) for token in added.tokens])
    numbers: Mapping[str, int] = changed.get_vocab()
    for token in added.tokens:
        if numbers.get(token.content) != token.id:
            raise ValueError(
                f"its token {token.content!r:.80} has the number {token.id}, and the base's tokenizer gives it "
                f"{numbers.get(token.content)}: add the same tokens to the base's own tokenizer, in that order"
            )
    return changed
