"""What every test may use: a home of its own, a tiny random Llama with a byte tokenizer, adapters for it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import settings

from tests.fixture_types import MakeAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Set before anything imports huggingface_hub, which reads them once: no test talks to the real hub.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:1")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when triton is first imported, by whatever imports it: without a GPU its interpreter runs our kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine is no fault: httpx's 5 s, the default of each call that names no other, are a minute here.
PATIENCE = httpx._config.DEFAULT_TIMEOUT_CONFIG
PATIENCE.connect = PATIENCE.read = PATIENCE.write = PATIENCE.pool = 60.0

# Nor are hypothesis's 200 ms an example; `--hypothesis-profile=ci` knows no such limit either.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh, empty home folder for each test."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("ADAPTERHUB_HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer with one token a byte, ChatML markers and no merges: 256 bytes, then 4 special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """The folder of a random 2-layer Llama (hidden 32, vocabulary 272, fp32, tied head) with the byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=byte_tokenizer.bos_token_id,
        eos_token_id=byte_tokenizer.eos_token_id,
        pad_token_id=byte_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """A function (seed=0, rank=4, alpha=8, targets=(...), **lora) -> folder of a plain PEFT adapter for `tiny_base`.

    B is random rather than zero, so that every adapter changes the base's answers.
    """

    def make(
        seed: int = 0,
        rank: int = 4,
        alpha: int = 8,
        targets: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"),
        **lora: Any,  # the other keywords of LoraConfig
    ) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(f"adapter-{seed}-{rank}")
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **lora)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the embedded base, made once a session; `$ADAPTERHUB_TEST_HOME` may name a home with it."""
    from adapterhub_lite.bases import resolve_base

    home = os.environ.get("ADAPTERHUB_TEST_HOME") or tmp_path_factory.mktemp("real-home")
    return resolve_base("smollm2-135m", home=home).folder
