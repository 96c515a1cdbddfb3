"""The process that lays out chats by templates of strangers. Knows its limits and the two pipes' ends, nothing else of the project.

Started once by `bounded`, it imports what a render needs and then waits. For each template it forks a child,
which takes one render after another from a socket of its own and ends when the socket does, or when it goes beyond a limit.
"""

import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS = 1.0
# On a machine that is busy or was asleep a second of computing takes far longer than a second; computing alone is held against it.
WALL_SECONDS = 30.0
# Beyond what the process has when it starts; holds on Linux.
MEMORY_BYTES = 256 << 20
MOST_CHARACTERS = 4 << 20
SHOWN_CHARACTERS = 300


def main() -> None:
    """Fork a child for each socket that comes over the control socket, until that is closed."""
    from transformers.utils.chat_template_utils import render_jinja_template

    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    control.sendall(b"r")
    while True:
        word, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        if os.fork() == 0:
            try:
                control.close()
                answer_renders(socket.socket(fileno=descriptors[0]), render_jinja_template)
            finally:
                os._exit(0)
        os.close(descriptors[0])


def answer_renders(connection: socket.socket, render: Any) -> None:
    """Answer each line, a render's arguments as JSON, by one line: `text`, or why it was `refused`."""
    limit_this_process()
    with connection.makefile("rwb") as file:
        for line in file:
            # Both signals end the process as it is, in the middle of whatever it computes.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            answer = answer_of(json.loads(line), render)
            file.write(json.dumps(answer).encode() + b"\n")
            file.flush()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def answer_of(arguments: dict[str, Any], render: Any) -> dict[str, str]:
    """One render."""
    try:
        text = str(render(**arguments)[0][0])
    except MemoryError:
        os._exit(1)  # nothing more can be told from here
    except Exception as error:  # a template raises whatever it asks for
        words = " ".join(f"{type(error).__name__}: {error}"[: 10 * SHOWN_CHARACTERS].split())
        return {"refused": words[:SHOWN_CHARACTERS]}
    if len(text) > MOST_CHARACTERS:
        return {"refused": f"it gives {len(text)} characters, at most {MOST_CHARACTERS} are taken"}
    return {"text": text}


def limit_this_process() -> None:
    """Bound memory, and forbid what no render needs: files written, core dumps."""
    for kind in (signal.SIGPROF, signal.SIGALRM, signal.SIGPIPE):
        signal.signal(kind, signal.SIG_DFL)
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        with Path("/proc/self/statm").open() as file:
            most = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
