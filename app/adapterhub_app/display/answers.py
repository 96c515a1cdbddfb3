"""One answer as it grows: a task and messages in, snapshots out. Chat, Compare and Blend all answer through here."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from adapterhub_app.backend import Backend, PendingAnswer
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.receipt import Receipt
from adapterhub_app.display.task import Task
from adapterhub_lite.errors import RequestCancelledError
from adapterhub_lite.serving import GenerationRequest

# A page can't show more than this, and eight people's pages together must leave the processor to the model.
SECONDS_BETWEEN_UPDATES = 0.05
STOPPED = "stopped"


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are drawn: `temperature` 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    """An answer so far. Complete once it has a receipt, or a notice: the sentence why it is not (wholly) there."""

    text: str = ""
    receipt: Receipt | None = None
    notice: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether no more of it will come."""
        return self.receipt is not None or self.notice is not None


def grow_answer(
    backend: Backend,
    session: str,
    task: Task,
    messages: Sequence[dict[str, str]],
    settings: AnswerSettings,
    pending: PendingAnswer | None = None,
) -> Iterator[Answer]:
    """Yield the answer as it grows, at most every `SECONDS_BETWEEN_UPDATES`; the last one is complete.

    Whatever goes wrong becomes its notice. Closing the iterator cancels the request, and so does `pending`, which may
    be cancelled before the first step.
    """
    answer, pending = Answer(), pending or PendingAnswer()
    try:
        request = GenerationRequest(
            messages=messages,
            adapter=task.pinned(backend.registry),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
        )
        # Watched before it is asked for: an adapter may have to be loaded first, and Stop works meanwhile.
        with backend.live.watch(session, pending):
            handle = backend.engine.submit(request)
            pending.attach(handle)
            shown_at = 0.0
            for chunk in handle:
                answer = replace(answer, text=answer.text + chunk.text)
                if chunk.result is not None:
                    yield Answer(chunk.result.text, Receipt.of(chunk.result, backend.base_name))
                elif chunk.text and time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                    shown_at = time.monotonic()
                    yield answer
    except RequestCancelledError:
        yield replace(answer, notice=STOPPED)
    except Exception as error:  # the page's edge: whatever happened, people get a sentence
        yield replace(answer, notice=sentence(error))
