"""What each field of a request means, once for all routes; the schema that the server hands out has it."""

from collections.abc import Mapping
from typing import Any

MEANINGS: Mapping[str, str] = {
    "add_generation_prompt": "Whether the chat ends with the beginning of the assistant's turn.",
    "alias": "The alias that moves, without its name.",
    "allowed_token_ids": "Only these tokens may be chosen.",
    "best_of": "So many answers are written, and the `n` most probable are given.",
    "candidate": "The reference that answers the share.",
    "chat_template_kwargs": "Arguments for the chat template.",
    "choices": "The texts whose probabilities are asked.",
    "content": "The text of the turn, or its parts.",
    "continue_final_message": "Whether the answer continues the last message instead of beginning a new one.",
    "continuous_usage_stats": "Whether each event of a stream has the usage so far.",
    "echo": "Whether the prompt comes first in the answer.",
    "expect": "The version that the alias has to point at before it moves; 0: there is none.",
    "frequency_penalty": "Taken from a token's logit for each time it was written before.",
    "guided_choice": "vLLM's older name: the answer is one of these texts.",
    "guided_grammar": "vLLM's older name: the answer is a sentence of this grammar.",
    "guided_json": "vLLM's older name: the answer is JSON after this schema.",
    "guided_regex": "vLLM's older name: the answer matches this expression.",
    "ignore_eos": "Whether the answer goes on after an end token.",
    "include_obfuscation": "Taken for OpenAI's clients; nothing is added to events.",
    "include_usage": "Whether a last event has the usage.",
    "logit_bias": "Added to the logits of tokens, by their id.",
    "logprobs": "Whether the chosen tokens' log-probabilities are given; for completions, with so many others.",
    "max_completion_tokens": "Most tokens of the answer.",
    "max_tokens": "Most tokens of the answer; the older name of `max_completion_tokens`.",
    "messages": "The chat so far.",
    "min_p": "Tokens less probable than this share of the most probable one are left out.",
    "min_tokens": "No end before so many tokens.",
    "model": "The base's name, a reference to an adapter, its digest, or a blend such as `sql*0.7+event*0.3`.",
    "n": "How many answers.",
    "presence_penalty": "Taken from a token's logit if it was written before.",
    "prompt": "The text, or the token ids, that the answer continues; or several.",
    "prompt_logprobs": "Log-probabilities of the prompt's own tokens, each with so many others.",
    "reference": "name, name:version, name@alias or a digest.",
    "repetition_penalty": "Divides the logits of tokens that are in prompt or answer; 1 changes nothing.",
    "response_format": "The form of the answer: text, any JSON object, or JSON after a schema.",
    "role": "Whose turn it is.",
    "seed": "The same seed draws the same tokens.",
    "share": "Of the requests, from 0 (the split ends) to 1.",
    "stop": "Texts that end the answer; they are no part of it.",
    "stop_token_ids": "Tokens that end the answer.",
    "stream": "Whether the answer comes in events as it is written.",
    "stream_options": "What a stream carries besides the text.",
    "structured_outputs": "The form of the answer as vLLM has it.",
    "temperature": "0 takes the most probable token each time; higher draws more freely.",
    "top_k": "Only so many of the most probable tokens are drawn from; 0: all.",
    "top_logprobs": "Each chosen token comes with so many others.",
    "top_p": "Only the most probable tokens that make up this share are drawn from.",
    "truncate_prompt_tokens": "Only so many of the prompt's last tokens are read.",
    "user": "Taken for OpenAI's clients; nothing depends on it.",
    "version": "The version that the alias points at afterwards.",
}


def with_meanings(schema: dict[str, Any]) -> None:
    """Add to the schema of a request what its fields mean, where it does not say so itself."""
    for name, one in schema.get("properties", {}).items():
        if name in MEANINGS:
            one.setdefault("description", MEANINGS[name])
