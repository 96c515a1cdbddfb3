"""Law: of the chat templates of public families, as TRL carries them, no mask is wrong and none is refused without a true reason."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapterhub_lite.errors import DataError
from adapterhub_lite.training.data.rows import load_rows
from adapterhub_lite.training.data.tokenization import IGNORED, tokenize_rows

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin or "").parent / "chat_templates" if SPEC else Path("nowhere")
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
pytestmark = pytest.mark.skipif(not FAMILIES, reason="trl is not installed: pip install adapterhub-lite[bench]")

# What ends an answer of a family, as the generation configurations on the Hub have it; ChatML's for the rest.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "llava": ("</s>",),
    "muse": ("<|eot|>",),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "smolvlm": ("<end_of_utterance>",),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
    },
}
CALL = {"type": "function", "id": "call_1a2b3", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call_1a2b3", "content": "Qrain"}
TWO = [user("Qone?"), assistant("Aone."), user("Qtwo?"), assistant("Atwo.")]
THOUGHT = [
    user("Qone?"), assistant("Aone.", reasoning_content="Rone"), user("Qtwo?"), assistant("Atwo.", reasoning_content="Rtwo"),
]  # fmt: skip
CHATS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": TWO[:2]},
    "two turns": {"messages": TWO},
    "system": {"messages": [{"role": "system", "content": "Qsys."}, *TWO]},
    "reasoning": {"messages": THOUGHT},
    "tools": {"messages": [TWO[0], assistant("", tool_calls=[CALL]), RESULT, assistant("Aone.")], "tools": [TOOL]},
}
# What a template has no place for: of each group it would have to read a word.
READ = {"reasoning": [{"reasoning_content", "reasoning", "thinking"}], "tools": [{"tools"}, {"tool_calls"}]}
REFUSED = {
    ("gemma", "system"): "System role not supported",
    # These write reasoning before a tool call, and nowhere else.
    **{(name, "reasoning"): r"leaves out reasoning \('Rone'\)" for name in ("gemma4", "gemma4_v3", "gemma4_v4")},
}


OF_PARTS = ("idefics3", "llava_next", "smolvlm")


def as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def ends_of(family: str) -> tuple[str, ...]:
    return (
        ENDS[max((name for name in ENDS if family.startswith(name)), key=len)]
        if family.startswith(tuple(ENDS))
        else ("<|im_end|>",)
    )


def tokenizer_for(family: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = ends_of(family)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", *ends)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=ends[0], pad_token="<s>")
    made.chat_template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    return made


def learned(tokenizer: Any, labels: list[int]) -> list[str]:
    """The stretches of a row that are learned."""
    found: list[list[int]] = [[]]
    for label in labels:
        found = [*found, []] if label == IGNORED and found[-1] else found
        found[-1] += [label] if label != IGNORED else []
    return [tokenizer.decode(stretch) for stretch in found if stretch]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_learned_with_its_end_and_nothing_of_the_questions(family: str, chat: str) -> None:
    tokenizer, row = tokenizer_for(family), CHATS[chat]
    ends = {tokenizer.convert_tokens_to_ids(end) for end in ends_of(family)}

    def prepared() -> Any:
        return tokenize_rows(load_rows([row]), tokenizer, max_length=10**6, ends=ends)

    words = set(re.findall(r"\w+", tokenizer.chat_template))
    readable = all(group & words for group in READ.get(chat, ()))
    reason = REFUSED.get((family, chat)) or (None if readable else "does not read")
    if reason:
        with pytest.raises(DataError, match=reason):
            prepared()
        return
    found = prepared()
    stretches = [text for labels in found.table["labels"] for text in learned(tokenizer, labels)]
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    assert len(stretches) == len(answers)
    for text, turn in zip(stretches, answers, strict=True):
        assert text.rstrip().endswith(ends_of(family))
        wanted = [turn["content"], turn.get("reasoning_content", ""), "weather" if turn.get("tool_calls") else ""]
        assert all(one in text for one in wanted), text
        assert not any(turn["content"] in text for turn in row["messages"] if turn["role"] != "assistant"), text
        assert not any(other["content"] in text for other in answers if other is not turn and other["content"]), text
    if len(found.table) == 1:
        turns = [as_parts(turn) for turn in row["messages"]] if family in OF_PARTS else row["messages"]
        whole = tokenizer.apply_chat_template(turns, tools=row.get("tools"))["input_ids"]
        ids = found.table[0]["input_ids"]
        # GLM marks the end of an answer by the next speaker, which a chat that is over does not have.
        assert ids == whole or (family == "glm4moe" and ids[:-1] == whole and ids[-1] in ends)


def test_there_are_as_many_families_as_is_said() -> None:
    assert len(FAMILIES) >= 31
