"""Law: the tokens and the mask that are trained equal what the template itself renders for that row."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import IGNORED, RowTokenizer, tokenize_rows
from tests.training.data.tokenizers import CHATML, GLM, KINDS, MARKED_THINKING, QWEN_THINKING, TEMPLATES, make_tokenizer

ENDS = {"chatml": "<|im_end|>", "qwen-thinking": "<|im_end|>", "marked": "<|im_end|>", "phi": "<|end|>"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TWO_TURNS = [user("hi"), assistant("yes"), user("and?"), assistant("no")]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}}}


def ends_of(tokenizer: Any, name: str) -> set[int]:
    return {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS.get(name, "</s>"))}


def trained(tokenizer: Any, row: dict[str, Any], name: str = "chatml", **options: Any) -> Any:
    ends = ends_of(tokenizer, name)
    return tokenize_rows(load_rows([row]), tokenizer, max_length=4096, ends=ends, **options)


def learned(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


TEXTS = st.text(st.sampled_from("hy i\n.:é☃<0"), min_size=1, max_size=8).filter(lambda text: text.strip() == text)
CHATS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
@given(chat=CHATS)
@settings(max_examples=4, deadline=None)
def test_the_ids_are_those_that_the_template_gives_when_it_tokenizes(kind: str, name: str, chat: Any) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[name], "<s> $A </s>")
    turns = [turn for asked, answer in chat for turn in (user(asked), assistant(answer))]
    found = trained(tokenizer, {"messages": turns}, name)
    if found.ways != {"per turn": len(chat)}:
        assert len(found.table) == 1
    for index, row in enumerate(found.table):
        # As asked: a chat that ends with the turn it teaches, or the whole of it.
        upto = turns if len(found.table) == 1 else turns[: 2 * index + 2]
        assert row["input_ids"] == tokenizer.apply_chat_template(upto, tokenize=True)["input_ids"]
        assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_mask_holds_each_answer_with_its_end_and_nothing_of_the_questions(name: str) -> None:
    tokenizer = make_tokenizer("bytes", TEMPLATES[name])
    rows = trained(tokenizer, {"messages": TWO_TURNS}, name).table
    text = "".join(learned(tokenizer, row["labels"]) for row in rows)
    end = ENDS.get(name, "</s>")
    assert text.count(end) == 2 and text.endswith(end)
    assert text.index("yes") < text.index(end) < text.index("no")
    assert "hi" not in text.replace("think", "") and "and?" not in text and "user" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_marks_of_the_template_give_the_mask_that_transformers_gives(kind: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES["marked"])
    plain = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    row = trained(tokenizer, {"messages": TWO_TURNS}, "marked").table[0]
    assert [label != IGNORED for label in row["labels"]] == [bool(one) for one in plain["assistant_masks"]]


def test_where_earlier_reasoning_goes_each_turn_is_learned_as_it_will_be_asked() -> None:
    tokenizer = make_tokenizer("bytes", QWEN_THINKING)
    turns = [user("a"), assistant("b", reasoning_content="why b"), user("c"), assistant("d", reasoning_content="why d")]
    found = trained(tokenizer, {"messages": turns}, "qwen-thinking")
    assert found.ways == {"per turn": 2}
    for index, row in enumerate(found.table):
        asked = tokenizer.apply_chat_template(turns[: 2 * index + 1], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert all(label == IGNORED for label in row["labels"][: len(asked)])
    assert learned(tokenizer, found.table[0]["labels"]) == "<think>\nwhy b\n</think>\n\nb<|im_end|>"
    assert "why b" not in tokenizer.decode(found.table[1]["input_ids"])


def test_tools_calls_and_results_reach_the_template() -> None:
    tokenizer = make_tokenizer("bytes", QWEN_THINKING)
    turns = [user("rain?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "yes"}, assistant("it rains")]
    row = trained(tokenizer, {"messages": turns, "tools": [WEATHER]}, "qwen-thinking").table[0]
    wanted = tokenizer.apply_chat_template(turns, tools=[WEATHER])["input_ids"]
    assert row["input_ids"] == wanted
    text = learned(tokenizer, row["labels"])
    assert '<call>weather {"city": "Oslo", "day": null}</call><|im_end|>' in text and "yes" not in text
    as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "day": null}'}}
    turns = [turns[0], assistant("", tool_calls=[as_text]), *turns[2:]]
    assert trained(tokenizer, {"messages": turns, "tools": [WEATHER]}, "qwen-thinking").table[0]["input_ids"] == wanted


def test_template_arguments_of_a_row_and_of_the_run_reach_the_template() -> None:
    tokenizer = make_tokenizer("bytes", QWEN_THINKING)
    row = {"messages": [user("a"), assistant("b")]}
    plain = learned(tokenizer, trained(tokenizer, row, "qwen-thinking").table[0]["labels"])
    assert plain == "<think>\n\n</think>\n\nb<|im_end|>"
    off = {"enable_thinking": False}
    of_row = trained(tokenizer, {**row, "chat_template_kwargs": off}, "qwen-thinking").table[0]["labels"]
    of_run = trained(tokenizer, row, "qwen-thinking", arguments=off).table[0]["labels"]
    assert learned(tokenizer, of_row) == learned(tokenizer, of_run) == "b<|im_end|>"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TWO_TURNS, "tools": [WEATHER]}, "does not read 'tools'"),
        (
            {"messages": [user("a"), assistant("b", tool_calls=[CALL])]},
            "turn 2: the chat template does not read 'tool_calls'",
        ),
        (
            {"messages": [user("a"), assistant("b", reasoning_content="c")]},
            "turn 2: .* does not read 'reasoning_content'",
        ),
        ({"messages": [user("a"), assistant("b", mood="glad")]}, "turn 2: .* does not read 'mood'"),
        ({"messages": TWO_TURNS, "chat_template_kwargs": {"enable_thinking": True}}, "does not read 'enable_thinking'"),
    ],
)
def test_what_a_template_does_not_read_is_refused_by_name_or_ignored_by_name(row: Any, words: str) -> None:
    tokenizer = make_tokenizer("bytes", CHATML)
    with pytest.raises(DataError, match=words):
        trained(tokenizer, row)
    ignored = frozenset({"tools", "tool_calls", "reasoning_content", "mood", "enable_thinking"})
    assert len(trained(tokenizer, row, ignore=ignored).table) == 1


def test_what_a_template_reads_and_leaves_out_is_refused() -> None:
    tokenizer = make_tokenizer("bytes", TEMPLATES["deepseek"])
    row = {"messages": [user("a"), assistant("<think>because</think>b")]}
    with pytest.raises(DataError, match=r"turn 2: the chat template leaves out content \('because'\)"):
        trained(tokenizer, row, "deepseek")
    names_alone = CHATML.replace("m['content']", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '')")
    row = {"messages": [user("rain?"), assistant("", tool_calls=[CALL])]}
    with pytest.raises(DataError, match=r"turn 2: the chat template leaves out tool_calls.arguments \('Oslo'\)"):
        trained(make_tokenizer("bytes", names_alone), row)
    as_python = names_alone.replace("function.name", "function | string")
    text = CALL["function"] | {"arguments": {"city": "Oslo's \u2603\n"}}
    row = {"messages": [user("rain?"), assistant("", tool_calls=[{"type": "function", "function": text}])]}
    assert len(trained(make_tokenizer("bytes", as_python), row).table) == 1


@pytest.mark.parametrize(
    ("role", "meant"), [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("Assistant", "assistant")]
)
def test_a_speaker_by_another_name_is_refused(role: str, meant: str) -> None:
    """A template that writes roles down as they are took it, with a mark that no question has, and an answer unlearned."""
    row = {"messages": [*TWO_TURNS, {"role": role, "content": "e"}]}
    with pytest.raises(DataError, match=f"turn {len(TWO_TURNS) + 1}: '{role}' is no role .*Say '{meant}'"):
        trained(make_tokenizer("bytes", CHATML), row)
    own = CHATML.replace("m['role']", "('human' if m['role'] in ('user', 'human') else m['role'])")
    row = {"messages": [{"role": "human", "content": "a"}, assistant("b")]}
    assert len(trained(make_tokenizer("bytes", own), row).table) == 1


def test_text_that_the_tokenizer_has_no_token_for_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("b", "c \u4e16", "d \u754c")]
    tokenizer = make_tokenizer("wordpiece")
    tokenizer.unk_token = "[UNK]"
    tokenize_rows(load_rows(rows), tokenizer, max_length=99)
    assert caplog.text.count("has no token for some of the text") == 1 and "row 1" in caplog.text
    caplog.clear()
    tokenize_rows(load_rows(rows), make_tokenizer("bytes"), max_length=99)
    assert not caplog.text


@pytest.mark.parametrize(
    ("turn", "weight"), [({"weight": 0}, 0), ({"train": False}, 0), ({"weight": 1}, 1), ({"weight": 0.25}, 0.25)]
)
def test_a_turn_counts_as_much_as_its_weight(turn: dict[str, Any], weight: float) -> None:
    tokenizer = make_tokenizer("bytes")
    turns = [user("a"), assistant("five", **turn), user("b"), assistant("four")]
    table = trained(tokenizer, {"messages": turns}).table
    assert ("five" in learned(tokenizer, table[0]["labels"])) == (weight > 0)
    assert ("token_weights" in table.column_names) == (weight == 0.25)
    if weight == 0.25:
        counts = {
            w for w, label in zip(table[0]["token_weights"], table[0]["labels"], strict=True) if label == ord("f")
        }
        assert counts == {0.25, 1.0} or 0.25 in table[0]["token_weights"]
    plain = [user("a"), assistant("five"), user("b"), assistant("four")]
    assert table[0]["input_ids"] == trained(tokenizer, {"messages": plain}).table[0]["input_ids"]


def test_parts_of_text_are_the_text_and_a_template_of_parts_gets_parts() -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    tokenizer = make_tokenizer("bytes")
    as_parts = trained(tokenizer, {"messages": [{"role": "user", "content": parts}, assistant("b")]})
    assert "hello" in tokenizer.decode(as_parts.table[0]["input_ids"])
    wants_parts = make_tokenizer(
        "bytes",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}",
    )
    row = trained(wants_parts, {"messages": [user("hello"), assistant("b")]}).table[0]
    assert wants_parts.decode(row["input_ids"]).startswith("<|im_start|>user:hello<|im_end|>")
    assert learned(wants_parts, row["labels"]) == "b<|im_end|>"


def test_what_asking_begins_and_the_rows_do_not_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer("bytes", TEMPLATES["deepseek"])
    found = trained(tokenizer, {"messages": TWO_TURNS}, "deepseek")
    assert caplog.text.count("begins it with '<think>\\n'") == 1 and found.prefill == "<think>\n"
    marked = make_tokenizer(
        "bytes",
        TEMPLATES["marked"].replace(
            "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>\n' }}{% endif"
        ),
    )
    assert trained(marked, {"messages": TWO_TURNS}, "marked").prefill == "<think>\n"
    assert trained(make_tokenizer("bytes"), {"messages": TWO_TURNS}).prefill == ""


def test_where_some_answers_begin_as_asked_none_is_asked_otherwise() -> None:
    tokenizer = make_tokenizer(
        "bytes",
        QWEN_THINKING.replace("(m.reasoning_content or '')", "m.reasoning_content").replace(
            "loop.index0 > ns.last", "m.reasoning_content"
        ),
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\n' }}{% if enable", "'<|im_start|>assistant\n<think>\n' }}{% if enable"
    )
    thought = {"messages": [user("a"), assistant("b", reasoning_content="why")]}
    plain = {"messages": [user("a"), assistant("b")]}
    for rows, prefill in (([thought], ""), ([plain], "<think>\n"), ([thought, plain], "")):
        ends = ends_of(tokenizer, "qwen-thinking")
        assert tokenize_rows(load_rows(rows), tokenizer, max_length=99, ends=ends).prefill == prefill


def test_an_answer_that_ends_with_the_mark_of_the_next_speaker_ends_so_in_the_last_turn_too() -> None:
    tokenizer = make_tokenizer("bytes", GLM)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in ("</s>", "<|end|>", "<|im_end|>")]
    result = {"role": "tool", "content": "yes"}
    call, written = assistant("", tool_calls=[CALL]), f"<call>weather{json.dumps(CALL['function']['arguments'])}"
    for turns, text in (
        (TWO_TURNS, "yes<|end|>no<|end|>"),
        ([user("rain?"), call], f"{written}<|im_end|>"),
        ([user("rain?"), call, result, assistant("it rains")], f"{written}<|im_end|>it rains<|end|>"),
    ):
        row = tokenize_rows(load_rows([{"messages": turns}]), tokenizer, max_length=999, ends=ends).table[0]
        assert learned(tokenizer, row["labels"]) == text
        assert row["input_ids"][:-1] == tokenizer.apply_chat_template(turns)["input_ids"]


def test_marks_that_lose_earlier_reasoning_are_learned_turn_by_turn() -> None:
    tokenizer = make_tokenizer("bytes", MARKED_THINKING)
    turns = [user("a"), assistant("b", thinking="why b"), user("c"), assistant("d", thinking="why d")]
    found = trained(tokenizer, {"messages": turns}, "marked")
    assert found.ways == {"per turn": 2}
    texts = [learned(tokenizer, labels) for labels in found.table["labels"]]
    assert texts == ["<think>why b</think>b<|im_end|>", "<think>why d</think>d<|im_end|>"]
    assert trained(tokenizer, {"messages": turns[:2]}, "marked").ways == {"marks": 1}


def test_a_chat_that_nobody_learns_from_is_refused() -> None:
    with pytest.raises(DataError, match="no turn is to be learned"):
        trained(make_tokenizer("bytes"), {"messages": [user("a"), assistant("b", weight=0)]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["", "<s> $A", "<s> $A </s>"])
def test_documents_have_one_beginning_and_one_end(kind: str, around: str) -> None:
    tokenizer = make_tokenizer(kind, "{{ bos_token }}" + CHATML, around)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rendered = "<s>" + "hi yes</s>\n"
    for row in (
        {"text": "hi yes"},
        {"text": rendered},
        {"prompt": "hi:\n", "completion": "yes"},
        {"prompt": "<s>hi:\n", "completion": "yes</s>"},
        {"prompt": "", "completion": "yes"},
    ):
        ids = trained(tokenizer, row, "zephyr").table[0]["input_ids"]
        assert ids.count(eos) == 1 and ids[1:].count(bos) == 0, (row, tokenizer.convert_ids_to_tokens(ids))
        if around and kind != "wordpiece":
            assert ids[0] == bos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("border", ["Q: hi\nA:\n", "Q: hi A: ", "hi", "Q:"])
@pytest.mark.parametrize("completion", ["yes", " yes", "\nyes", "i"])
def test_a_prompt_is_trained_as_it_is_asked_and_the_completion_is_what_follows(
    kind: str, border: str, completion: str
) -> None:
    from adapterhub_lite.bases.encoding import encode_prompt

    tokenizer = make_tokenizer(kind, around="<s> $A")
    row = trained(tokenizer, {"prompt": border, "completion": completion}, "zephyr").table[0]
    asked = encode_prompt(tokenizer, border)
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"] == [IGNORED] * len(asked) + row["input_ids"][len(asked) :]
    whole = tokenizer(border + completion)["input_ids"]
    if whole[: len(asked)] == asked:
        assert row["input_ids"] == [*whole, tokenizer.eos_token_id]
    if kind != "wordpiece":
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True).endswith(completion)


def test_a_tokenizer_without_offsets_gives_the_same_mask() -> None:
    class Slow:
        """What a tokenizer in Python offers."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def encode(self, text: str, **options: Any) -> list[int]:
            return list(self.inner.encode(text, **options))

        def __call__(self, text: Any, **options: Any) -> Any:
            return self.inner(text, **{key: value for key, value in options.items() if key != "return_offsets_mapping"})

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    fast = make_tokenizer("bytes")
    rows = [("row 0", {"messages": TWO_TURNS})]
    ends = ends_of(fast, "chatml")
    ((_, slow),) = RowTokenizer(Slow(fast), ends=ends).examples(rows)  # type: ignore[arg-type]
    ((_, plain),) = RowTokenizer(fast, ends=ends).examples(rows)
    assert slow == plain


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_template_of_an_adapter_lays_out_the_same_within_its_limits(name: str) -> None:
    rows = load_rows([{"messages": TWO_TURNS}])
    own, other = make_tokenizer("bytes", TEMPLATES[name]), make_tokenizer("bytes", "{{ raise_exception('not mine') }}")
    ends = ends_of(own, name)
    plain = tokenize_rows(rows, own, max_length=999, ends=ends).table
    bounded = tokenize_rows(rows, other, max_length=999, ends=ends, bounded_template=TEMPLATES[name]).table
    assert plain["input_ids"] == bounded["input_ids"] and plain["labels"] == bounded["labels"]
