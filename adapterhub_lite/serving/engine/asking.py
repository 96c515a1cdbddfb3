"""The tokens that a request is asked with: its prompt as it stands, or its chat laid out by the template that counts."""

import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from adapterhub_lite.bases.chat.bounded import render_bounded
from adapterhub_lite.bases.chat.template import render_chat, template_digest, template_of, words_of
from adapterhub_lite.bases.encoding import encode_after, encode_prompt
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.engine.request import GenerationRequest
from adapterhub_lite.serving.engine.text import Tokenizers


class PromptEncoder:
    """Encodes for one base of `vocabulary` tokens, which takes `max_length` of prompt and answer together. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, vocabulary: int) -> None:
        self.tokenizer, self._max_length, self._vocabulary = tokenizer, max_length, vocabulary
        self._tokenizing = threading.Lock()
        self._tokenizers = Tokenizers(tokenizer)
        self._template_digest = template_digest(tokenizer)

    def tokenizer_of(self, found: FoundAdapters) -> PreTrainedTokenizerBase:
        """The tokenizer that the adapters `found` are asked and read with: the base's, with tokens of their own if any.

        Raises:
            ConfigurationError: the base's does not take them.
        """
        with self._tokenizing:
            return self._tokenizers.of(found.added_tokens())

    def encode_labels(self, labels: Sequence[str], prompt_length: int, found: FoundAdapters) -> list[list[int]]:
        """Encode labels as what follows a prompt of so many tokens.

        Raises:
            ConfigurationError: they do not fit, or one is the beginning of another.
        """
        tokenizer = self.tokenizer_of(found)
        with self._tokenizing:
            encoded = [encode_after(tokenizer, label) for label in labels]
        tokens, most = sum(map(len, encoded)), self._max_length - prompt_length
        if tokens > most:
            raise ConfigurationError(
                f"The labels have {tokens} tokens together, and {most} are left after the prompt. Give fewer or shorter ones."
            )
        for (ids, label), (longer, other) in pairwise(sorted(zip(encoded, labels, strict=True))):
            if longer[: len(ids)] == ids:
                raise ConfigurationError(
                    f"The label {label!r} is the beginning of {other!r}, so there is no probability of the one against "
                    "the other. Give labels of which none begins another."
                )
        return encoded

    def check_tokens(self, request: GenerationRequest, prompt_ids: Sequence[int], vocabulary: int = 0) -> None:
        """Refuse token ids that the base has not, with ConfigurationError; with an adapter's own there are `vocabulary`."""
        vocabulary = max(vocabulary, self._vocabulary)
        given = {
            "prompt_token_ids": prompt_ids, "stop_token_ids": request.stop_token_ids,
            "logit_bias": request.logit_bias, "allowed_token_ids": request.allowed_token_ids or (),
        }  # fmt: skip
        for name, ids in given.items():
            wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
            if wrong is not None:
                whose = "this base has" if vocabulary == self._vocabulary else "base and adapter have"
                raise ConfigurationError(f"{name} has {wrong}; {whose} the tokens 0 to {vocabulary - 1}.")

    def encode(self, request: GenerationRequest, found: FoundAdapters) -> list[int]:
        """Encode the prompt or the chat of a request to the adapters `found`.

        Raises:
            ConfigurationError: the template refuses the chat, or the prompt is empty or too long.
            BaseMismatchError: the adapters have no chat template in common.
        """
        tokenizer = self.tokenizer_of(found)
        if request.prompt_token_ids is not None:
            ids = list(request.prompt_token_ids)
        elif request.messages is None:
            with self._tokenizing:
                ids = encode_prompt(tokenizer, request.prompt or "")
        else:
            template = found.template(self._template_digest)
            whose = "base's" if template is None else "adapter's"
            words = words_of(template or template_of(tokenizer, request.tools))
            given = {"tools": request.tools, **request.chat_template_kwargs}
            unread = sorted(key for key, value in given.items() if value and key not in words)
            if unread:
                raise ConfigurationError(f"The {whose} chat template does not read {unread[0]!r}. Ask without it.")
            try:
                # Outside the lock: an adapter's template may take its time, and others need not wait for it.
                render = render_chat if template is None else partial(render_bounded, template)
                go_on = request.continue_final_message
                text = render(
                    tokenizer,
                    request.messages,
                    tools=request.tools,
                    arguments={**request.chat_template_kwargs, **({"continue_final_message": True} if go_on else {})},
                    ask=not go_on,
                )
            except ValueError as error:
                raise ConfigurationError(f"The {whose} chat template refused the messages: {error}") from error
            text = text if go_on else text.removesuffix(found.prefill())
            with self._tokenizing:
                ids = tokenizer.encode(text, add_special_tokens=False)
        if request.truncate_prompt_tokens is not None:
            ids = ids[-request.truncate_prompt_tokens :]
        if not ids:
            raise ConfigurationError(
                "The prompt is empty, so there is nothing to go on from. Give at least one character."
            )
        if len(ids) >= self._max_length:
            raise ConfigurationError(
                f"The prompt has {len(ids)} tokens, this base takes at most {self._max_length - 1}. Shorten it."
            )
        return ids
