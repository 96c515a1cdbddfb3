"""Whether a running vLLM serves the base that it should: its length, its tokens, and what it answers.

The answers are held against the base's own forward on this machine, computed once and kept in the home by the base's
fingerprint. A server names its base as it likes, so a name proves nothing; ours are not asked to have any.
"""

import json
import logging
import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.probes import DEFAULT_PROBES, TOLERANCES
from adapterhub_lite.bases import ResolvedBase, load_base_model
from adapterhub_lite.bases.broken import read_object
from adapterhub_lite.errors import BaseMismatchError, ConfigurationError, ServingError
from adapterhub_lite.serving.vllm.backend import Backend, Loop
from adapterhub_lite.serving.vllm.wire import Json, token_logprobs

logger = logging.getLogger("adapterhub.vllm")
# Alternatives that vLLM tells by default.
TOP = 16
# A base whose own forward would take more than this share of the machine's free memory is not computed here.
MEMORY_SHARE = 0.8
# The first request of all may compile kernels.
FIRST_SECONDS = 600.0
TEXTS = (
    *DEFAULT_PROBES,
    "Größe 12,5 µm — naïve café\n\t日本語 🙂",
    "<|im_start|>user\nHello<|im_end|>\n",
    "  two  spaces ",
)
Reference = list[list[tuple[int, float]]]


def check_tokens(backend: Backend, loop: Loop, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare how a few awkward texts become tokens there and here.

    Raises:
        BaseMismatchError: otherwise than here.
    """
    for text in TEXTS:
        found = loop.call(backend.tokenize(text))
        wanted = tokenizer(text, add_special_tokens=True)["input_ids"]
        if found is not None and found != wanted:
            raise BaseMismatchError(
                f"vLLM at {backend.url} has another tokenizer: {text!r:.60} are {len(found)} tokens there, {found[:8]}..., and "
                f"{len(wanted)} here, {wanted[:8]}.... Start it on this base's folder, or give its base with --base."
            )


def check_answers(backend: Backend, loop: Loop, base: ResolvedBase, home: Path) -> float | None:
    """Compare the likeliest next tokens after the probes; the largest difference of a log-probability.

    None: not compared, because the base is too large to be computed here.

    Raises:
        BaseMismatchError: they differ by more than rounding.
    """
    wanted = reference(base, home)
    if wanted is None:
        logger.warning("%s is too large to be computed here, so vLLM's answers are not compared with it.", base.name)
        return None
    prompts = _prompts(base)
    largest = max(abs(value) for row in wanted for _, value in row)
    tolerance = max(TOLERANCES.values()) * max(1.0, largest)
    worst = 0.0
    for ids, row in zip(prompts, wanted, strict=True):
        body: Json = {
            "model": backend.base_model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": TOP,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choice = loop.call(backend.answer(body), FIRST_SECONDS)["choices"][0]
        try:
            (told,) = token_logprobs(choice["logprobs"], choice["token_ids"], TOP)
        except (KeyError, TypeError, ValueError) as error:
            raise ServingError(f"vLLM's answer is not what its interface promises: {error!r}.") from error
        own = dict(told.top)
        # The last ones of either list may just be missing in the other.
        for token, value in row[: TOP // 2]:
            worst = max(worst, abs(own[token] - value) if token in own else max(0.0, value - min(own.values())))
    if worst > tolerance:
        raise BaseMismatchError(
            f"vLLM at {backend.url} answers otherwise than {base.name}: log-probabilities differ by up to {worst:.3g}, and "
            f"rounding explains {tolerance:.3g}. It serves another base, or another quantisation of it."
        )
    return worst


def reference(base: ResolvedBase, home: Path) -> Reference | None:
    """The `TOP` likeliest tokens after each probe with their log-probabilities, by the base's own forward."""
    kept = home / "verdicts" / f"next-tokens-{base.fingerprint}.json"
    try:
        return [[(int(token), float(value)) for token, value in row] for row in json.loads(kept.read_bytes())]
    except (OSError, ValueError, TypeError):
        pass
    size = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    if size > MEMORY_SHARE * _free_memory():
        return None
    found = _computed(base)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        aside.write_text(json.dumps(found))
        aside.replace(kept)
    except OSError as error:
        logger.warning("The base's own answers could not be kept in %s: %s.", kept.parent, error.strerror)
    return found


def _computed(base: ResolvedBase) -> Reference:
    import torch

    model = load_base_model(base.folder, device="cpu").eval()
    found: Reference = []
    with torch.inference_mode():
        for ids in _prompts(base):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            values, tokens = torch.log_softmax(logits, -1).topk(min(TOP, logits.shape[-1]))
            found.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))
    return found


def _prompts(base: ResolvedBase) -> list[list[int]]:
    from adapterhub_lite.bases import load_tokenizer
    from adapterhub_lite.bases.encoding import encode_prompt

    tokenizer = load_tokenizer(base.folder)
    return [encode_prompt(tokenizer, text) for text in DEFAULT_PROBES]


def _free_memory() -> float:
    import torch

    from adapterhub_lite.devices import free_memory

    return free_memory(torch.device("cpu"))


def check_base(
    backend: Backend, loop: Loop, base: ResolvedBase, tokenizer: PreTrainedTokenizerBase, home: Path
) -> float | None:
    """All of the above, cheapest first; returns what `check_answers` does.

    Raises:
        BaseMismatchError: it serves another base.
    """
    limit = read_object(base.folder / "config.json").get("max_position_embeddings")
    if backend.max_length <= 0:
        raise ConfigurationError(f"vLLM at {backend.url} does not say how long a text may be (max_model_len).")
    if limit and backend.max_length > limit:
        logger.warning("vLLM at %s takes %d tokens, the base was made for %d.", backend.url, backend.max_length, limit)
    check_tokens(backend, loop, tokenizer)
    return check_answers(backend, loop, base, home)
