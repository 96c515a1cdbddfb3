"""What `train` says when Ctrl-C or SIGTERM ended it: what there is now, how to go on, and how to keep it as it is."""

import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from adapterhub_lite.errors import RunStoppedError


class Interruptible:
    """A `with` block around `train`: leaves it with what can be said of the run at that moment, as an error for people.

    `keep` are the words behind the folder in the command that adds a checkpoint: the adapter's name and its options.
    `folder` is asked for the run's folder once there is one, `finished` is the adapter's.
    """

    def __init__(self, name: str, base: str, home: str | None) -> None:
        self.keep = [name, "--base", base, *(["--home", home] if home else [])]
        self.folder: Callable[[], Path] | None = None
        self.finished: Path | None = None

    def __enter__(self) -> "Interruptible":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from adapterhub_lite.training.distributed.launch import tells_of_stops

        if isinstance(error, KeyboardInterrupt | RunStoppedError):
            number = error.signal if isinstance(error, RunStoppedError) else signal.SIGINT
            if not tells_of_stops():
                raise SystemExit(128 + number) from None
            raise RunStoppedError(self.described(), number) from None

    def described(self) -> str:
        """The sentences for now."""
        if self.finished is not None:
            return (
                f"Interrupted. The run is finished, in {self.finished}; `adapterhub-lite list {self.keep[0]}` says whether "
                "it was added, and the same command adds it."
            )
        if self.folder is None:
            return "Interrupted before the run began. The same command starts it, or goes on with it."
        from adapterhub_lite.bases.fit import inspect_adapter
        from adapterhub_lite.training.run.interrupts import last_saved

        saved = last_saved(self.folder())
        if saved is None:
            return "Interrupted: nothing of the run is saved yet. The same command starts it again."
        goes_on = "finishes the run" if saved.steps >= saved.wanted else "goes on from there"
        text = f"Stopped. {saved} The same command {goes_on}."
        if inspect_adapter(saved.folder).problems:
            # A trained base, or an adapter that began with part of it: no adapter lies there.
            return text
        command = shlex.join(["adapterhub-lite", "add", str(saved.folder), *self.keep])
        return f"{text} To keep what is there as it is: {command}"
