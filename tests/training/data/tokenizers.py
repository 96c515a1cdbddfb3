"""Tokenizers of each kind, and chat templates shaped like those of public families, all made here."""

from copy import deepcopy
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n", "é", "☃"]
MARKERS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Markers that are plain text, and the end token behind both roles.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The end of the text behind the last turn only, so that no turn is a prefix of the whole.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Earlier reasoning goes, and the last turn has a block of it even where it is empty; knows tools.
QWEN_THINKING = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) "
    "+ '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Asked, it has begun to think; answers in the history have not.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# The last answer ends with another token than those before it, which lose their analysis.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if loop.last and m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|im_start|>assistant' }}"
    "{% endif %}{{ '<|channel|>final<|message|>' + m.content + (eos_token if loop.last else '<|end|>') }}{% else %}"
    "{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# The end of an answer is the mark of the next speaker, so the last one has none.
GLM = (
    "{% for m in messages %}{{ {'user': '<|end|>', 'tool': '<|im_end|>'}.get(m.role, '<|' + m.role + '|>') + '\n' }}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
TEMPLATES = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "phi": PHI,
    "qwen-thinking": QWEN_THINKING,
    "deepseek": DEEPSEEK,
    "channels": CHANNELS,
    "marked": MARKED,
}
# Marks what the assistant writes, and leaves reasoning out of all turns but the last.
MARKED_THINKING = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ ('<think>' + m.thinking + '</think>' if m.thinking and loop.last else '') + m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}",
)


def _bytes(merges: list[tuple[str, str]]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def _sentencepiece(scheme: str) -> Tokenizer:
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "y"), ("\n", "\n")]
    words = [*CHARACTERS, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>"))
    if scheme == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def _wordpiece() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = ["[UNK]", *letters, *("##" + letter for letter in letters), "yes", "hi"]
    made = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


KINDS = ("bytes", "byte merges", "prepend", "metaspace first", "metaspace always", "metaspace never", "wordpiece")


def make_tokenizer(kind: str, template: str = CHATML, around: str = "") -> Any:
    """A tokenizer of a kind; `around` is "" or the tokens its post-processor adds: "<s> $A", "<s> $A </s>"."""
    core = {
        "bytes": lambda: _bytes([]),
        "byte merges": lambda: _bytes([("Ġ", "y"), ("Ċ", "Ċ"), ("h", "i"), (":", "Ċ")]),
        "prepend": lambda: _sentencepiece("normalizer"),
        "metaspace first": lambda: _sentencepiece("first"),
        "metaspace always": lambda: _sentencepiece("always"),
        "metaspace never": lambda: _sentencepiece("never"),
        "wordpiece": _wordpiece,
    }[kind]()
    core.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS])
    if around:
        ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = template
    return deepcopy(made)
