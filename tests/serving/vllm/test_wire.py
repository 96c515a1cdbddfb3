"""What of a request goes over to vLLM: each of its settings, in vLLM's words, and nothing else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from adapterhub_lite.serving import GenerationRequest
from adapterhub_lite.serving.vllm.engine import VllmEngine
from tests.serving.vllm.pretend import PretendVllm

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
# setting -> (a value, what the body then has otherwise than without it)
SENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": ("b", {"prompt": [65]}),
    "max_new_tokens": (3, {"max_tokens": 3}),
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.25, {"min_p": 0.25}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "seed": (7, {"seed": 7}),
    "stop": (("q", "r"), {"stop": ["q", "r"]}),
    "min_tokens": (1, {"min_tokens": 1}),
    "stop_token_ids": ((9,), {"stop_token_ids": [9, 257]}),
    "ignore_eos": (True, {"stop_token_ids": []}),
    "logprobs": (2, {"logprobs": 2}),
    "prompt_logprobs": (1, {"prompt_logprobs": 1}),
    "logit_bias": ({70: 2.5}, {"logit_bias": {"70": 2.5}}),
    "allowed_token_ids": ((70, 71), {"allowed_token_ids": [70, 71]}),
    "special_tokens": (True, {"skip_special_tokens": False}),
    "schema": (SCHEMA, {"structured_outputs": {"json": SCHEMA}}),
    "regex": ("[a-c]", {"structured_outputs": {"regex": "[a-c]"}}),
    "choices": (("a", "b"), {"structured_outputs": {"choice": ["a", "b"]}}),
    "grammar": ('start: "a"', {"structured_outputs": {"grammar": 'start: "a"'}}),
}
# Ways to say the prompt, which goes over as tokens; who waits, and whose request it is; and the two with tests of their own.
NOT_SENT = {
    "messages", "tools", "chat_template_kwargs", "prompt_token_ids", "continue_final_message", "truncate_prompt_tokens",
    "any_form", "timeout_seconds", "tenant", "adapter", "labels",
}  # fmt: skip


def test_every_setting_is_known_here() -> None:
    assert SENT.keys() | NOT_SENT == {field.name for field in dataclasses.fields(GenerationRequest)}
    assert not SENT.keys() & NOT_SENT


@pytest.mark.parametrize("setting", SENT)
def test_a_setting_goes_over_and_changes_nothing_else(
    setting: str, vllm: PretendVllm, before: Callable[..., VllmEngine]
) -> None:
    engine, (value, wanted) = before(vllm), SENT[setting]
    plain = {"prompt": "a", "max_new_tokens": 2}
    for asked in (plain, {**plain, setting: value}):
        engine.generate(GenerationRequest(**asked))
    without, found = vllm.bodies[-2:]
    assert {key: value for key, value in found.items() if key not in without or without[key] != value} == wanted
    assert without.keys() <= found.keys()
