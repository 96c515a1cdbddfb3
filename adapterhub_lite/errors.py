"""Every exception the project raises on purpose, in one tree. Knows nothing else of the project.

AdapterHubError                   what any caller may catch; its text is one sentence fit for a user
├── UsageError                    the caller asked for something that cannot be (exit code 2)
│   ├── DataError                 a training row, file or data set is malformed
│   ├── UnknownNameError          no such task, base, preset, adapter, version or alias
│   ├── ReferenceSyntaxError      not of the form name, name:3, name@alias or a digest
│   ├── BrokenBaseError           the files of a base are damaged or contradict each other
│   └── ConfigurationError        settings that contradict each other, or that this machine cannot honour
│       └── MissingExtraError     what was asked for needs an extra that is not installed; also an ImportError
├── AdapterRejectedError          an adapter failed validation; `.problems` lists every reason
├── IntegrityError                bytes are not those that the manifest promised
├── BaseMismatchError             the adapter was made for another base
├── RegistryError                 the local store cannot do it
│   ├── AliasConflictError        the alias was moved in the meantime (compare-and-swap failed)
│   └── SchemaVersionError        written by a newer version of this project
├── HubError                      the remote hub cannot do it
│   ├── HubUnreachableError       no network, time-out, 5xx after bounded retries
│   ├── HubPermissionError        missing, private, gated, or the token may not write
│   └── PublishConflictError      somebody else kept publishing first, after bounded retries
├── TrainingError                 a run stopped because continuing would be wrong
│   ├── ProofFailedError          the first-step proof found a broken run
│   ├── NonFiniteLossError        the loss became NaN or infinite
│   ├── OutOfMemoryError          the device is too small; the text says what would fit
│   └── RunStoppedError           stopped on request; the text says what is saved, and the same call continues from it
├── MergeError                    a merge that would be silently wrong is refused
├── ServingError                  a request or a load could not be served
│   ├── QueueFullError            the bounded queue is full: try later (429)
│   ├── RequestTimeoutError       the request ran past its own limit
│   ├── RequestCancelledError     the caller cancelled it
│   ├── EngineUnreachableError    the engine behind the server does not answer now (503)
│   └── EngineClosedError         the engine was closed
└── ResourceError                 a resource of the machine is missing: disk full, port in use, read-only folder
"""

from collections.abc import Sequence
from difflib import get_close_matches
from signal import Signals


class AdapterHubError(Exception):
    """Root of the tree. `str(error)` says what was expected, what was found, and what to do.

    To do: read the sentence; below stands what each kind asks for.
    """


class UsageError(AdapterHubError):
    """The caller asked for something that cannot be; the command line ends with exit code 2.

    To do: correct the call; nothing was changed.
    """


class DataError(UsageError):
    """A training row, file or data set is malformed; the text names file and line if known.

    To do: correct the row or the file that is named; `adapterhub-lite preview FILE` shows how rows are read.
    """


class UnknownNameError(UsageError):
    """No such task, base, preset, adapter, version or alias.

    To do: take one of the names that are listed, or add what is missing.
    """

    @classmethod
    def among(cls, kind: str, name: str, known: Sequence[str]) -> "UnknownNameError":
        """Build the error for `name`, not one of `known`, with the nearest match when there is one."""
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(known) if known else "none yet"
        return cls(f"There is no {kind} {name!r}.{hint} Known: {listed}.")


class ReferenceSyntaxError(UsageError):
    """A reference that is not `name`, `name:version`, `name@alias` or a full digest.

    To do: write `name`, `name:3`, `name@alias` or the full digest.
    """


class BrokenBaseError(UsageError):
    """The files of a base are damaged, contradict each other, or are not what transformers reads.

    To do: fetch the base again, or correct the file that the text names.
    """


class ConfigurationError(UsageError):
    """Settings that contradict each other, or that this machine cannot honour.

    To do: change one of the settings that the text names.
    """


class MissingExtraError(ConfigurationError, ImportError):
    """A part of the package that is not installed; the text has the command that installs it here.

    To do: type the command in the text; it fits how the package was installed here.
    """


class AdapterRejectedError(AdapterHubError):
    """An adapter failed validation. `problems` holds every reason found, not only the first.

    To do: mend every problem that is listed, or ask whoever made the adapter.
    """

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{subject} was refused: " + "; ".join(self.problems))


class IntegrityError(AdapterHubError):
    """Bytes are not those that the manifest promised.

    To do: fetch it again; if it persists, `adapterhub-lite doctor` says what else is damaged.
    """


class BaseMismatchError(AdapterHubError):
    """The adapter was made for another base than the one at hand.

    To do: give the base that it was made for, or train it for this one.
    """


class RegistryError(AdapterHubError):
    """The local store cannot do what was asked.

    To do: follow the text; `adapterhub-lite doctor` examines the whole registry.
    """


class AliasConflictError(RegistryError):
    """The alias was moved by somebody else since it was read.

    To do: look where the alias points now, and move it again if that is still right.
    """


class SchemaVersionError(RegistryError):
    """The data was written by a newer version of this project.

    To do: upgrade adapterhub-lite, or use another home.
    """


class HubError(AdapterHubError):
    """The remote hub cannot do what was asked.

    To do: follow the text; whatever was acknowledged is kept, and the call can be repeated.
    """


class HubUnreachableError(HubError):
    """No network, a time-out, or a server error that outlasted the bounded retries.

    To do: check network and endpoint, and repeat the call: it goes on where it stopped.
    """


class HubPermissionError(HubError):
    """The repository is missing, private or gated, or the token may not write to it.

    To do: check the spelling of the repository, and log in with `hf auth login`.
    """


class PublishConflictError(HubError):
    """Somebody else kept publishing first, more often than the bounded retries allow.

    To do: pull what others published, or wait, and push again.
    """


class TrainingError(AdapterHubError):
    """A run stopped because continuing would be wrong.

    To do: follow the text: it says which step, and what of the run is kept.
    """


class ProofFailedError(TrainingError):
    """The first-step proof found a run that is not doing what it should; the text names the cause and the remedy.

    To do: do what the text proposes: the run would have learned nothing, or something else.
    """


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite.

    To do: lower the learning rate, or look at the rows of the step that the text names.
    """


class OutOfMemoryError(TrainingError):
    """The device is too small for the run; the text says what would have fit.

    To do: take the preset or the batch size that the text says would fit, or `on_out_of_memory="replan"`.
    """


class RunStoppedError(TrainingError):
    """A run was stopped on request, by `signal`; the text says what of it is saved.

    To do: repeat the same command to continue from the checkpoint.
    """

    def __init__(self, text: str, signal: Signals = Signals.SIGTERM) -> None:
        super().__init__(text)
        self.signal = signal


class MergeError(AdapterHubError):
    """A merge that would be silently wrong; the text gives the reason and the alternative.

    To do: take the method or the base that the text proposes.
    """


class ServingError(AdapterHubError):
    """A request or an adapter load could not be served.

    To do: follow the text; other requests and the server are not affected.
    """


class QueueFullError(ServingError):
    """The bounded queue is full; the caller should try again later.

    To do: wait as long as `Retry-After` says and ask again, or raise the limit.
    """


class RequestTimeoutError(ServingError):
    """The request ran past its own time limit.

    To do: ask for less, or raise `--timeout-seconds`.
    """


class RequestCancelledError(ServingError):
    """The caller cancelled the request.

    To do: nothing: somebody wanted it to end.
    """


class EngineUnreachableError(ServingError):
    """The engine that the server asks, another process, does not answer now.

    To do: send the request again in a moment; the server's log says what became of the engine.
    """


class EngineClosedError(ServingError):
    """The engine was closed before or while the request ran.

    To do: open a new engine; a server that is draining answers nothing new.
    """


class ResourceError(AdapterHubError):
    """A resource of the machine is missing: disk full, port in use, read-only folder.

    To do: free the disk, the port or the folder that the text names.
    """
