"""Tokenisation: the loss falls on the assistant's tokens and nowhere else."""

from copy import deepcopy
from typing import Any

import pytest

from adapterhub_lite.errors import DataError
from adapterhub_lite.training import load_rows
from adapterhub_lite.training.data.tokenization import IGNORED, tokenize_rows

TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "no"},
    ]
}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned(tokenizer: Any, row: dict[str, Any], **settings: Any) -> str:
    settings = {"max_length": 512, **settings}
    table = tokenize_rows(load_rows([row]), tokenizer, **settings).table
    assert len(table[0]["labels"]) == len(table[0]["input_ids"]) == table[0]["length"]
    pairs = zip(table[0]["labels"], table[0]["input_ids"], strict=True)
    assert all(label in (IGNORED, token) for label, token in pairs)
    return str(tokenizer.decode([label for label in table[0]["labels"] if label != IGNORED]))


def test_only_the_assistants_turns_and_their_end_are_learned(byte_tokenizer: Any) -> None:
    assert learned(byte_tokenizer, TWO_TURNS) == "ho<|im_end|>no<|im_end|>"


def test_the_ids_are_those_of_the_template(byte_tokenizer: Any) -> None:
    table = tokenize_rows(load_rows([TWO_TURNS]), byte_tokenizer, max_length=512).table
    wanted = byte_tokenizer.apply_chat_template(TWO_TURNS["messages"], tokenize=False)
    assert byte_tokenizer.decode(table[0]["input_ids"]) == wanted


def test_a_template_with_generation_markers_is_believed(byte_tokenizer: Any) -> None:
    marked = deepcopy(byte_tokenizer)
    marked.chat_template = MARKED
    assert learned(marked, TWO_TURNS) == "ho<|im_end|>no<|im_end|>"


def test_of_prompt_and_completion_the_completion_is_learned(byte_tokenizer: Any) -> None:
    assert learned(byte_tokenizer, {"prompt": "2+2=", "completion": "4"}) == "4<|im_end|>"
    chat = {"prompt": TWO_TURNS["messages"][:3], "completion": TWO_TURNS["messages"][3:]}
    assert learned(byte_tokenizer, chat) == "no<|im_end|>"


def test_all_of_a_text_is_learned_with_an_end(byte_tokenizer: Any) -> None:
    assert learned(byte_tokenizer, {"text": "words"}) == "words<|im_end|>"


def test_a_row_beyond_the_limit_is_refused_truncated_or_dropped_and_counted(byte_tokenizer: Any) -> None:
    rows = load_rows([{"text": "short"}, {"text": "much too long"}])
    with pytest.raises(DataError, match="row 1: expected at most 8 tokens, found 14"):
        tokenize_rows(rows, byte_tokenizer, max_length=8)
    cut = tokenize_rows(rows, byte_tokenizer, max_length=8, overlong="truncate")
    assert (cut.truncated, cut.dropped, cut.table["length"]) == (1, 0, [6, 8])
    kept = tokenize_rows(rows, byte_tokenizer, max_length=8, overlong="drop")
    assert (kept.truncated, kept.dropped, kept.table["length"]) == (0, 1, [6])


def test_a_row_with_nothing_left_to_learn_is_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no token is left to learn"):
        learned(byte_tokenizer, {"prompt": "long prompt", "completion": "x"}, max_length=4, overlong="truncate")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "lays out the turns before turn 2 in another way",
        ),
    ],
)
def test_a_template_that_cannot_show_the_assistants_tokens_is_refused(
    byte_tokenizer: Any, template: str | None, words: str
) -> None:
    other = deepcopy(byte_tokenizer)
    other.chat_template = template
    with pytest.raises(DataError, match=words):
        learned(other, TWO_TURNS)


def test_the_fingerprint_sees_ids_and_labels(byte_tokenizer: Any) -> None:
    def fingerprint(*rows: dict[str, Any]) -> str:
        return tokenize_rows(load_rows(list(rows)), byte_tokenizer, max_length=512).fingerprint

    assert fingerprint({"text": "a"}) == fingerprint({"text": "a"})
    assert fingerprint({"text": "a"}) != fingerprint({"text": "b"})
    assert fingerprint({"prompt": "a", "completion": "b"}) != fingerprint(
        {"prompt": "ab", "completion": ""} | {"completion": "c"}
    )
