"""A process of several ends when gloo's threads are at rest: Python's lock asked for later than that aborts it."""

import hashlib
import sys
import threading
from pathlib import Path

import pytest

from adapterhub_lite.training.distributed import sharded


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are seen in /proc")
def test_an_interpreter_ends_when_gloo_is_at_rest() -> None:
    begun, done, stop = threading.Event(), threading.Event(), threading.Event()

    def work_as_gloo_does() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        data = b"\0" * (1 << 20)
        begun.set()
        # Without Python's lock for the most part, and back for it at the end.
        for _ in range(100):
            hashlib.sha256(data)
        done.set()
        stop.wait()

    thread = threading.Thread(target=work_as_gloo_does)
    thread.start()
    try:
        begun.wait()
        sharded._rest(patience_seconds=60)
        assert done.is_set()
        assert sharded._gloo_sleeps()
    finally:
        stop.set()
        thread.join()
