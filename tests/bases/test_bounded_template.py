"""Law: a stranger's template lays out what transformers lays out, or is refused within its limits, and nobody waits for it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases.chat.bounded import PROCESSES, TemplateProcesses, render_bounded, template_problem
from adapterhub_lite.bases.chat.template import render_chat
from adapterhub_lite.errors import QueueFullError
from tests.training.data.tokenizers import CHATML, QWEN_THINKING, TEMPLATES, make_tokenizer

# Computes for ever when it is asked so, and not before.
SLEEPER = (
    CHATML
    + "{% if messages[-1].content == 'boom' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
USER = {"role": "user", "content": "hi"}
BOOM = {"role": "user", "content": "boom"}


@pytest.fixture
def own() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses()
    yield made
    made.close()


def arguments(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"conversations": [turns], "add_generation_prompt": True}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("ask", [False, True])
def test_the_text_is_that_of_the_tokenizers_own_template(name: str, ask: bool) -> None:
    tokenizer = make_tokenizer("bytes", TEMPLATES[name])
    turns = [USER, {"role": "assistant", "content": "\ud83d é </think>\u2028", "reasoning": "why", "name": None}, USER]
    assert render_bounded(TEMPLATES[name], tokenizer, turns, ask=ask) == render_chat(tokenizer, turns, ask=ask)


def test_tools_and_arguments_reach_it_and_no_argument_takes_the_place_of_the_chat() -> None:
    tokenizer = make_tokenizer("bytes", QWEN_THINKING)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "a": 1.5}}}]
    given: dict[str, Any] = {"tools": tools, "arguments": {"enable_thinking": False}, "ask": True}
    assert render_bounded(QWEN_THINKING, tokenizer, [USER], **given) == render_chat(tokenizer, [USER], **given)
    given["arguments"] = {"conversations": [[BOOM]], "chat_template": "{{ 9 ** 9 }}"}
    assert "boom" not in render_bounded(QWEN_THINKING, tokenizer, [USER], **given)


def test_a_template_that_computes_for_ever_ends_alone_and_answers_the_next_chat() -> None:
    assert template_problem(SLEEPER) is None
    with pytest.raises(ValueError, match="for more than a second"):
        PROCESSES.render(SLEEPER, arguments(BOOM))
    assert "hi" in PROCESSES.render(SLEEPER, arguments(USER))


def test_others_do_not_wait_for_it(own: TemplateProcesses) -> None:
    own.render(CHATML, arguments(USER))
    refused = threading.Event()

    def ask_for_ever() -> None:
        with pytest.raises(ValueError, match="for more than a second"):
            own.render(SLEEPER, arguments(BOOM))
        refused.set()

    thread = threading.Thread(target=ask_for_ever)
    thread.start()
    answered = 0
    while not refused.is_set():
        own.render(CHATML, arguments(USER))
        answered += not refused.is_set()
    thread.join()
    assert answered > 20


def test_who_asks_a_busy_template_is_told_to_come_again(
    own: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub_lite.bases.chat.bounded.BUSY_SECONDS", 0.01)
    own._busy.add(CHATML)
    with pytest.raises(QueueFullError, match="Try again later"):
        own.render(CHATML, arguments(USER))
    assert "hi" in own.render(QWEN_THINKING, arguments(USER))


def test_there_are_never_more_processes_than_said(own: TemplateProcesses) -> None:
    for number in range(12):
        assert "hi" in own.render(f"{number}{CHATML}", arguments(USER))
    assert len(own._idle) == 4


def test_it_starts_again_when_its_processes_were_killed(own: TemplateProcesses) -> None:
    own.render(CHATML, arguments(USER))
    assert own._process is not None
    own._process.kill()
    own._process.wait()
    own._idle.popitem()[1].close()
    assert "hi" in own.render(CHATML, arguments(USER))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_sees_no_secret_of_the_server_and_ends_with_it() -> None:
    code = (
        "from pathlib import Path\n"
        "from adapterhub_lite.bases.chat.bounded import PROCESSES\n"
        "PROCESSES.render('{{ messages }}', {'conversations': [[{'role': 'user', 'content': 'a'}]]})\n"
        "print(PROCESSES._process.pid, 'hf_secret' in Path(f'/proc/{PROCESSES._process.pid}/environ').read_text())\n"
        "import os; os._exit(0)"
    )
    environment = {**os.environ, "HF_TOKEN": "hf_secret"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    pid, secret = found.stdout.split()
    assert secret == "False"
    deadline = time.monotonic() + 20
    while runs(pid):
        assert time.monotonic() < deadline, "it outlives the server"


def runs(pid: str) -> bool:
    """Whether the process is there and has not ended: one that nobody waits for stays in the list."""
    with suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False
