"""`adapterhub-lite serve` as a process of its own, on a free port, with its memory and its log within reach."""

import contextlib
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class ServedProcess:
    """A server that listens. `url` is its address; `log` holds what it said, once it has ended."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path

    def bytes_of(self, row: str) -> int:
        """A row of /proc/PID/status: VmRSS, VmHWM or VmSize, in bytes."""
        found = re.search(rf"{row}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def allow(self, more: int) -> None:
        """Let the process have `more` bytes of address space beyond what it has now, as prlimit does."""
        limit = self.bytes_of("VmSize") + more
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def served_process(base: Path, home: Path, log: Path, *options: str) -> Iterator[ServedProcess]:
    """Start the server and stop it at the end, killed if need be."""
    command = [sys.executable, "-m", "adapterhub_lite", "serve", "--base", str(base), "--home", str(home)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    process = subprocess.Popen([*command, "--port", "0", *options], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    rest = threading.Thread(target=lambda: log.write_text("".join([*said, *(process.stderr or ())])))
    try:
        for line in process.stderr:
            said.append(line)
            if "http://" in line:
                break
        found = re.search(r"(http://[^/\s]+)/v1", "".join(said))
        assert found is not None, "".join(said)[-2000:]
        rest.start()
        yield ServedProcess(process, found[1], log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if rest.ident is not None:
            rest.join()
        process.stderr.close()
