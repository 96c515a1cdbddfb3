"""A streamed answer as server-sent events: its pieces as they are made, each with its choice's index."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from adapterhub_lite.serving.api.chat.tool_calls import ChatDeltas, ChatPlan
from adapterhub_lite.serving.api.errors import error_event
from adapterhub_lite.serving.api.wire import answers
from adapterhub_lite.serving.api.wire.answers import Decode
from adapterhub_lite.serving.api.wire.sampling import StreamOptions
from adapterhub_lite.serving.engine.request import GenerationChunk

Json = dict[str, Any]
Pieces = AsyncGenerator[tuple[int, GenerationChunk]]


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, even before the first event, what it held is released."""

    def __init__(
        self, events: AsyncGenerator[str], pieces: Pieces, admission: ExitStack, headers: dict[str, str]
    ) -> None:
        self._events, self._pieces, self._admission = events, pieces, admission
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._pieces.aclose()
            self._admission.close()


class Streamed(Protocol):
    """An answer that becomes events piece by piece."""

    def events(self, index: int, chunk: GenerationChunk) -> list[str]:
        """The events of one piece of the choice `index`."""
        ...

    def end(self, usage: Json) -> list[str]:
        """The last events."""
        ...

    def failed(self, error: Exception) -> str:
        """The last event of a stream that failed in the middle."""
        ...


@dataclass
class StreamedAnswer:
    """Turns the pieces of a request's choices into events. `head` is what every event starts with.

    `plan` is that of a chat. `echoes` are the texts of the prompts, one per choice, where they come first.
    """

    head: Json
    decode: Decode
    options: StreamOptions
    echoes: Sequence[str] = ()
    plan: ChatPlan | None = None
    chats: dict[int, ChatDeltas] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    written: dict[int, int] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)

    def events(self, index: int, chunk: GenerationChunk) -> list[str]:
        """The events of one piece of the choice `index`."""
        self.written[index] = self.written.get(index, 0) + len(chunk.token_ids)
        found: list[Json] = []
        if index not in self.begun:
            self.begun.add(index)
            if self.plan is not None:
                self.chats[index] = ChatDeltas(self.plan)
                found.append(answers.chat_piece(index, {"role": "assistant", "content": ""}))
            elif self.echoes:
                found.append(self._echo(index, chunk))
        if self.plan is not None:
            found += self._chat(index, chunk, self.chats[index])
        else:
            reason = chunk.result.finish_reason if chunk.result is not None else None
            found.append(self._completion(index, chunk, reason))
        so_far = answers.usage_of(chunk.prompt_tokens, self.written[index])
        more = {"usage": so_far} if self.options.continuous_usage_stats else {}
        return [answers.event(self.head | {"choices": [one]} | more) for one in found if _says_something(one)]

    def end(self, usage: Json) -> list[str]:
        """The last events."""
        more = [answers.event(self.head | {"choices": [], "usage": usage})] if self.options.include_usage else []
        return [*more, "data: [DONE]\n\n"]

    def failed(self, error: Exception) -> str:
        """The last event of a stream that failed in the middle."""
        return error_event(error)

    def _chat(self, index: int, chunk: GenerationChunk, deltas: ChatDeltas) -> list[Json]:
        found = [answers.chat_piece(index, delta) for delta in deltas.feed(chunk.text, last=chunk.done)]
        # The last piece says how it ended; what was held back may have come before.
        last = found[-1] if found else answers.chat_piece(index, {})
        last["logprobs"] = answers.chat_logprobs(chunk.logprobs or None, self.decode)
        if chunk.result is not None:
            last["finish_reason"] = deltas.finish_reason(chunk.result)
        return found or [last]

    def _echo(self, index: int, chunk: GenerationChunk) -> Json:
        told = answers.completion_logprobs(chunk.prompt_logprobs, self.decode)
        self.offsets[index] = len(self.echoes[index])
        return answers.completion_piece(index, self.echoes[index], logprobs=told)

    def _completion(self, index: int, chunk: GenerationChunk, reason: str | None) -> Json:
        offset = self.offsets.get(index, 0)
        told = answers.completion_logprobs(chunk.logprobs or None, self.decode, offset=offset)
        self.offsets[index] = offset + sum(map(len, told["tokens"] if told else ()))
        return answers.completion_piece(index, chunk.text, reason=reason, logprobs=told)


def _says_something(choice: Json) -> bool:
    return bool(choice.get("text") or choice.get("delta") or choice["finish_reason"] or choice["logprobs"])
