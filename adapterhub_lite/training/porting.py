"""What scripts written for other trainers say, and what it is here: one table, for the error and for the docs.

Arguments of TRL's `SFTConfig` and `SFTTrainer`, and those that older versions of transformers and TRL had. An argument is
taken where it means something, and otherwise answered in one sentence. Knows no torch.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from adapterhub_lite.errors import ConfigurationError

logger = logging.getLogger(__name__)
Kind = Literal["taken", "renamed", "not needed", "refused"]


@dataclass(frozen=True)
class Answer:
    """What becomes of an argument. `text` is a clause after its name; `harmless` are values that change nothing anyway."""

    kind: Kind
    text: str
    harmless: tuple[Any, ...] = ()


# A value of any type may be harmless, as in `harmless=(None, False)`.
ANSWERS: dict[str, Answer] = {
    # SFTConfig, taken by its own name.
    "max_length": Answer("taken", "longest row in tokens, None for no limit; longer rows are refused unless `overlong` says otherwise"),
    "packing": Answer("taken", "'bfd', 'bfd_split', 'wrapped' or 'none'; True is 'bfd'; sequences stay apart"),
    "padding_free": Answer("taken", "on by default, for every model that can"),
    "pad_to_multiple_of": Answer("taken", "batches are padded then, to a multiple of it"),
    "dataset_text_field": Answer("taken", "the column of plain text"),
    "completion_only_loss": Answer("taken", "the default; False learns the prompt too"),
    "assistant_only_loss": Answer("taken", "the default, with any template; False learns the whole chat"),
    "chat_template_path": Answer("taken", "a Jinja file, or a folder with a tokenizer; it goes with the adapter"),
    "eos_token": Answer("taken", "a token of the base's vocabulary"),
    "pad_token": Answer("taken", "a token of the base's vocabulary; padding is masked by length anyway"),
    "shuffle_dataset": Answer("taken", "rows are shuffled by `seed` before anything else"),
    "router_aux_loss_coef": Answer("taken", "weight of the router loss of mixture-of-experts models; 0 turns it off"),
    # SFTConfig, under another name.
    "max_seq_length": Answer("renamed", "is max_length"),
    "truncation_mode": Answer("renamed", "is overlong: 'keep_start' is 'truncate', 'keep_end' is 'truncate_start'"),
    "packing_strategy": Answer("renamed", "is packing: packing='bfd', 'bfd_split' or 'wrapped'"),
    # SFTConfig, without a counterpart.
    "dataset_num_proc": Answer("not needed", "rows are tokenised by the tokenizer's own threads, in batches"),
    "dataset_batch_size": Answer("not needed", "rows are tokenised in batches"),
    "eval_packing": Answer("not needed", "an evaluation is a mean over tokens, which packing does not change"),
    "dataset_kwargs": Answer("not needed", "rows that have input_ids are left as they are", (None, {}, "{}")),
    "loss_type": Answer("taken", "'nll' or 'dft' is learned, evaluations report nll; 'chunked_nll' is 'nll', which builds no logits"),
    "activation_offloading": Answer("refused", "is not taken: set activation_checkpointing_kwargs={'offload': True}", (None, False)),
    "trust_remote_code": Answer("refused", "is never done here: load the model and pass it as `model`", (None, False)),
    "model_init_kwargs": Answer("refused", "takes dtype alone (base_dtype here): load the model and pass it as `model`", (None, {}, "{}")),
    "num_of_sequences": Answer("not needed", "packing looks at all rows"),
    "chars_per_token": Answer("not needed", "packing counts tokens"),
    "use_liger": Answer("refused", "is loss_backend='liger'; the default loss builds no logits either", (None, False)),
    # transformers, older names.
    "evaluation_strategy": Answer("renamed", "is eval_strategy"),
    "no_cuda": Answer("renamed", "is use_cpu"),
    "use_mps_device": Answer("not needed", "the device is found by itself"),
    "group_by_length": Answer("renamed", "is train_sampling_strategy='group_by_length'"),
    "warmup_ratio": Answer("renamed", "is warmup_steps, which below 1 is a share of the run"),
    "include_inputs_for_metrics": Answer("renamed", "is include_for_metrics=['inputs']"),
    "overwrite_output_dir": Answer("refused", "would delete what a run left: give a new folder, or resume", (None, False)),
    "logging_dir": Answer("not needed", "TensorBoard's files lie in output_dir; TENSORBOARD_LOGGING_DIR moves them"),
    "save_safetensors": Answer("not needed", "weights are always safetensors", (None, True)),
    "push_to_hub_token": Answer("renamed", "is hub_token"),
    "half_precision_backend": Answer("not needed", "there is one", ("auto", "amp", "cuda_amp", "cpu_amp")),
    "tokenizer": Answer("renamed", "is processing_class"),
    "jit_mode_eval": Answer("refused", "is torch_compile=True", (None, False)),
    "past_index": Answer("refused", "was removed from transformers", (None, -1)),
    "include_tokens_per_second": Answer("not needed", "metrics.jsonl has it"),
    "ddp_timeout_seconds": Answer("renamed", "is ddp_timeout"),
    # SFTTrainer.
    "peft_config": Answer("taken", "a LoraConfig, instead of rank, alpha and target_modules"),
    "formatting_func": Answer("taken", "makes a row, or its text, of each row of yours"),
    "quantization_config": Answer("refused", "is memory_preset='qlora-nf4' or 'lora-int8', or a model that you loaded with it", (None,)),
    "infinite": Answer("refused", "is max_steps", (None, False)),
}  # fmt: skip
# Arguments of the trainer, all others are those of its settings.
TRAINER_ARGUMENTS = ("peft_config", "formatting_func", "quantization_config", "tokenizer", "infinite")
TRUNCATION = {"keep_start": "truncate", "keep_end": "truncate_start"}
STRATEGIES = ("bfd", "bfd_split", "wrapped")


def translated(keywords: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The keywords of `AdapterTrainingArguments` that `keywords`, of whatever trainer, stand for.

    Raises:
        ConfigurationError: one means nothing here, or is refused; says in one sentence each what does it.
    """
    known = set(known)
    given = dict(keywords)
    made = {name: value for name, value in given.items() if name in known}
    problems: list[str] = []
    for name, value in ((name, value) for name, value in given.items() if name not in known):
        try:
            for key, meant in meaning_of(name, value, given).items():
                made.setdefault(key, meant)
        except ValueError as error:
            problems.append(str(error))
        except LookupError:
            near = get_close_matches(name, [*known, *ANSWERS], n=1)
            problems.append(f"there is no argument {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if problems:
        raise ConfigurationError("The training arguments cannot be used: " + "; ".join(problems) + ".")
    return made


def meaning_of(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What one foreign argument stands for, {} where it changes nothing.

    Raises:
        ValueError: it is refused; the text is a clause.
        LookupError: nothing is known of it.
    """
    answer = ANSWERS[name]
    if any(type(value) is type(one) and value == one for one in answer.harmless):
        return {}
    if name == "truncation_mode" and isinstance(value, str) and value in TRUNCATION:
        # Where there is packing by cutting, nothing is longer than it may be.
        return {"overlong": TRUNCATION[value]}
    if name == "packing_strategy" and isinstance(value, str) and value in STRATEGIES:
        # True, or "True" of a command line; it overrules what `packing` alone would mean.
        return {}
    if name == "max_seq_length":
        return {"max_length": value}
    if name == "evaluation_strategy":
        return {"eval_strategy": value}
    if name == "no_cuda":
        return {"use_cpu": value}
    if name == "warmup_ratio":
        return {} if given.get("warmup_steps") or not value else {"warmup_steps": value}
    if name == "group_by_length":
        return {"train_sampling_strategy": "group_by_length"} if value else {}
    if name == "include_inputs_for_metrics":
        return {"include_for_metrics": ["inputs"]} if value else {}
    if name == "push_to_hub_token":
        return {"hub_token": value}
    if name == "model_init_kwargs" and isinstance(value, Mapping) and set(value) <= {"dtype", "torch_dtype"}:
        (dtype,) = value.values()
        return {"base_dtype": None if dtype == "auto" else str(dtype).removeprefix("torch.")}
    if name == "dataset_kwargs" and not (isinstance(value, Mapping) and set(value) <= {"skip_prepare_dataset"}):
        raise ValueError(f"{name} takes skip_prepare_dataset alone, and {answer.text}")
    if answer.kind == "not needed":
        if value is not None:
            logger.warning(f"{name} is not needed here: {answer.text}.")
        return {}
    raise ValueError(f"{name}={value!r} {answer.text}")


def packing_of(packing: object, strategy: object = None) -> str:
    """The name of a way to pack, for what TRL's two arguments say."""
    word = str(packing).lower()
    if word in ("false", "none", ""):
        return "none"
    return str(strategy or "bfd") if word == "true" else word
