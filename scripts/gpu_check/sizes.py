"""What the parts work on: models of real sizes for a GPU, tiny ones for the rehearsal on a CPU; random weights, no network."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2.5's own sizes, of the models the memory table is about.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "1.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "7B": {
        "model_type": "qwen2",
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2",
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run. `loss_law` and `loss` are (tokens, vocabulary, columns); `measured` are names in `SHAPES`.

    `ranks` are of the memory table, `rows` and `tokens` a training step's, `batches` the engine's rows in one step.
    """

    device: torch.device
    proven: str
    measured: tuple[str, ...]
    loss_law: tuple[int, int, int]
    loss: tuple[int, int, int]
    tokens: int
    rows: int
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    batches: tuple[int, ...] = (1, 8, 32)
    answer: int = 64
    rounds: int = 5


REAL = Sizes(torch.device("cuda"), "0.5B", ("1.5B", "7B"), (509, 20011, 896), (16384, 248320, 2048), 1024, 4)
TINY = Sizes(torch.device("cpu"), "tiny", ("tiny",), (37, 90, 32), (64, 500, 32), 64, 2, (4,), (1, 2), 6, 1)


def make_base(size: str, scratch: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """The folder of random weights of a size with a byte tokenizer and a chat template; made once in `scratch`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = scratch / f"base-{size}-{str(dtype).removeprefix('torch.')}"
    if folder.exists():
        return folder
    settings = dict(SHAPES[size])
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws billions of numbers in a second, a CPU in minutes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    return part.rename(folder)


def byte_tokenizer() -> Any:
    """One token per byte, and the marks of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "bos_token": "<|im_start|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    fast.chat_template = TEMPLATE
    return fast


def chats(count: int, tokens: int) -> list[dict[str, Any]]:
    """Rows of up to `tokens` tokens, of uneven lengths; the first has them all but for a few."""
    rows = []
    for number in range(count):
        length = max(8, (tokens - 64) * (count - number % 4) // count)
        text = "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length))
        turns = [{"role": "user", "content": f"number {number}"}, {"role": "assistant", "content": text}]
        rows.append({"messages": turns})
    return rows


def make_adapter(base: Path, folder: Path, rank: int, seed: int, device: torch.device) -> Path:
    """A plain PEFT folder for a base, random in A and B, so that it changes every answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if folder.exists():
        return folder
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": device.type})
    made = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    randomise(made)
    part = folder.with_name(folder.name + ".part")
    made.save_pretrained(part)
    return part.rename(folder)


def randomise(model: Any) -> None:
    """Draw B too: as PEFT begins, it is 0 and the adapter does nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
