"""Which files of the package a call runs through, in the order in which they are first entered.

A file counts when one of its functions is entered, in any thread; code at module level, which runs once on import,
does not. Run the call once before, so that imports and caches that fill on first use are out of the way.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tests.checkout import ROOT

PACKAGE = str(ROOT / "adapterhub_lite") + "/"


@contextmanager
def files_entered(*, again: bool = False) -> Iterator[list[str]]:
    """Yield a list that fills while the block runs: paths under `adapterhub_lite/`, in the order of first entry.

    Threads that started before the block are not seen, because a profile function belongs to its thread; start them
    inside, and `clear()` the list where the call begins. With `again` a file is listed each time that it is entered
    from another one.
    """
    entered: list[str] = []

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            name = code.co_filename.removeprefix(PACKAGE)
            if (name not in entered) if not again else (entered[-1:] != [name]):
                entered.append(name)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type] # None takes it away; typeshed does not say so
