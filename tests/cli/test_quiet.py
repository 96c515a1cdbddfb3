"""Other libraries' chatter stays off what is read by programs."""

import os
import pty
import subprocess
import sys

import pytest

PROGRAM = (
    "from adapterhub_lite.quiet import quiet_libraries; quiet_libraries();"
    "from huggingface_hub.utils.tqdm import are_progress_bars_disabled as off; print(off())"
)


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_that_redraw_themselves_are_for_a_terminal(terminal: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=theirs if terminal else subprocess.PIPE,
            env=environment,
            text=True,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout.strip() == str(not terminal)
