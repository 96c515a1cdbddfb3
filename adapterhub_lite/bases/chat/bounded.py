"""A chat laid out by the template of a stranger, such as an adapter's: in a process with limits of time, memory and text.

Jinja's sandbox keeps a template from the machine, not from computing for ever: two nested loops, a power of a power or a
long repetition would end the thread that renders. Here each template has a process of its own, started when it is
first asked with and kept for the next chat. What goes beyond a limit ends that process and is refused; nobody else waits
for it, since a template is laid out once at a time and at most `MOST_PROCESSES` of them are.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.bases.chat.template import Turn
from adapterhub_lite.errors import ConfigurationError, QueueFullError, ResourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_PROCESSES = 4
# How long a chat waits for its template's turn, and for a process to start at all.
BUSY_SECONDS = 10.0
START_SECONDS = 60.0
# A little longer than the process gives itself.
ANSWER_SECONDS = 40.0
MOST_ANSWER_BYTES = 64 << 20
# What a render may need of this process's environment, and nothing that is secret.
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
EXCEEDED = "it computes for more than a second, or needs more memory than a template may"


class TemplateProcesses:
    """The processes that lay out chats, one for each template. Thread-safe."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._starting = threading.Lock()
        self._idle: OrderedDict[str, socket.socket] = OrderedDict()
        self._busy: set[str] = set()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, arguments: Mapping[str, Any]) -> str:
        """The text of a chat; `arguments` are those of transformers' `render_jinja_template`.

        Raises:
            ValueError: the template refuses the chat, or goes beyond a limit.
            QueueFullError: chats for this template, or for several slow ones, wait too long for their turn.
        """
        try:
            line = json.dumps({**arguments, "chat_template": template}).encode() + b"\n"
        except (TypeError, RecursionError) as error:
            raise ValueError(f"a chat has to be plain data: {error}") from error
        with self._condition:
            if not self._condition.wait_for(lambda: self._has_room(template), BUSY_SECONDS):
                raise QueueFullError("Too many chats wait for adapters' own chat templates. Try again later.")
            self._busy.add(template)
            connection = self._idle.pop(template, None)
            while len(self._idle) + len(self._busy) > MOST_PROCESSES:
                self._idle.popitem(last=False)[1].close()
        try:
            # A process that has answered before may have ended, or be full of what came before: a new one is asked then.
            answer = asked(connection, line) if connection is not None else None
            if answer is None:
                connection = self._connect()
                answer = asked(connection, line)
        except BaseException:
            # Whatever is still on its way belongs to nobody.
            if connection is not None:
                connection.close()
            raise
        finally:
            with self._condition:
                self._busy.remove(template)
                if connection is not None and connection.fileno() >= 0:
                    self._idle[template] = connection
                self._condition.notify_all()
        if answer is None or "text" not in answer:
            raise ValueError(EXCEEDED if answer is None else answer["refused"])
        return answer["text"]

    def _has_room(self, template: str) -> bool:
        return template not in self._busy and len(self._busy) < MOST_PROCESSES

    def _connect(self) -> socket.socket:
        """A socket to a new process."""
        with self._starting:
            for _ in range(2):
                control = self._control or self._start()
                mine, theirs = socket.socketpair()
                with theirs:
                    try:
                        socket.send_fds(control, [b"f"], [theirs.fileno()])
                        return mine
                    except OSError:
                        # The process that forks has ended; a new one takes its place.
                        mine.close()
                        self.close()
        raise ResourceError("The process that lays out chats by adapters' own templates keeps ending.")

    def _start(self) -> socket.socket:
        if not hasattr(os, "fork"):
            raise ConfigurationError(
                "An adapter's own chat template is laid out in a process with limits, which this system has not. Ask "
                "with a prompt, laid out by hand."
            )
        control, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "adapterhub_lite.bases.chat.render_worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is the server's alone
            )
        control.settimeout(START_SECONDS)
        with suppress(OSError):
            if control.recv(1):
                self._control = control
                return control
        control.close()
        self.close()
        raise ResourceError("The process that lays out chats by adapters' own templates could not be started.")

    def close(self) -> None:
        """End the process that forks; those of templates end with their sockets."""
        with self._condition:
            while self._idle:
                self._idle.popitem()[1].close()
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def forget(self) -> None:
        """Begin anew in a process that was forked: the sockets are its parent's."""
        self.__init__()  # type: ignore[misc]


def asked(connection: socket.socket, line: bytes) -> Mapping[str, str] | None:
    """Send a render and return its answer: `text`, or why it was `refused`. None: the process ended over it."""
    connection.settimeout(ANSWER_SECONDS)
    found = b""
    with suppress(OSError):
        connection.sendall(line)
        with connection.makefile("rb") as file:
            found = file.readline(MOST_ANSWER_BYTES)
    if not found.endswith(b"\n"):
        connection.close()
        return None
    answer: dict[str, str] = json.loads(found)
    return answer


def render_bounded(
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    ask: bool = False,
) -> str:
    """What `render_chat` gives with a template of a stranger, within the limits.

    Raises:
        ValueError: the template refuses the chat, or goes beyond a limit.
        QueueFullError: too many chats wait for templates of strangers.
    """
    given = {
        **tokenizer.special_tokens_map,
        **(arguments or {}),
        "conversations": [[{key: value for key, value in turn.items() if value is not None} for turn in turns]],
        "tools": [dict(tool) for tool in tools] if tools else None,
        "add_generation_prompt": ask,
    }
    return PROCESSES.render(template, given)


PROCESSES = TemplateProcesses()
atexit.register(PROCESSES.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESSES.forget)

# What a template has to lay out before it is taken: it may refuse some of these, not all.
ASKED = "Hello there"
CHATS: Sequence[Sequence[Mapping[str, str]]] = (
    ({"role": "user", "content": ASKED},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}),
    (
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ),
)


def can_lay_out() -> bool:
    """Whether chats can be laid out here: what only keeps adapters has no transformers, and Windows cannot fork."""
    return hasattr(os, "fork") and find_spec("transformers") is not None


def template_problem(template: str) -> str | None:
    """Why a template of a stranger is not taken: it goes beyond a limit, or lays out no chat at all; None if it is."""
    reasons = []
    for turns in CHATS:
        arguments = {"conversations": [turns], "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
        try:
            text = PROCESSES.render(template, arguments)
            reasons += [] if ASKED in text else ["it does not write what the user says"]
        except ValueError as error:
            reasons.append(str(error))
            if str(error) == EXCEEDED:
                return EXCEEDED
    return reasons[0] if len(reasons) == len(CHATS) else None
