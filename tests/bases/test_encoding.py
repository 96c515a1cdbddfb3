"""From tokens back to bytes: what a token stands for is told for each kind of tokenizer, or not at all."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from adapterhub_lite.bases.encoding import token_bytes


def test_each_byte_of_a_byte_level_tokenizer_is_itself(byte_tokenizer: Any) -> None:
    ids = [byte_tokenizer.encode(chr(code), add_special_tokens=False)[-1] for code in range(0x80, 0x800, 0x40)]
    assert all(len(token_bytes(byte_tokenizer, token) or b"") == 1 for token in ids)
    text = "é☃ \x07🦊 a\xad"
    spelt = [token_bytes(byte_tokenizer, token) for token in byte_tokenizer.encode(text, add_special_tokens=False)]
    assert b"".join(filter(None, spelt)) == text.encode() and None not in spelt
    assert token_bytes(byte_tokenizer, byte_tokenizer.eos_token_id) == b"<|im_end|>"


@pytest.mark.parametrize(
    ("piece", "spelt"),
    [("<0xE2>", b"\xe2"), ("a", b"a"), ("\ufffd", "\ufffd".encode()), ("☃\x00", b"\xe2\x98\x83\x00")],
)
def test_pieces_of_bytes_and_characters_of_sentencepiece(piece: str, spelt: bytes) -> None:
    made = Tokenizer(models.BPE(vocab={"<unk>": 0, piece: 1}, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), 1) == spelt
