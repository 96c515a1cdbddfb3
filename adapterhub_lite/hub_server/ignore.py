"""What a `.gitignore` leaves out, within a bounded time: its patterns come from whoever may write to the repository."""

import time
from collections.abc import Iterable, Sequence

import pathspec
import regex
from pathspec.pattern import RegexMatchResult
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from adapterhub_lite.hub_server.store import HubRefusal

MOST_SECONDS = 2.0


def ignored_files(patterns: str, paths: Iterable[str]) -> Sequence[str]:
    """Those of `paths` that the text of a `.gitignore` leaves out.

    Raises:
        HubRefusal: 400, a pattern is malformed, or matching takes longer than `MOST_SECONDS`.
    """
    end = time.monotonic() + MOST_SECONDS

    class Bounded(GitIgnoreSpecPattern):
        """A pattern on an engine that gives up: Python's own may take forever over `*a*a*a*b`."""

        def match_file(self, file: str) -> RegexMatchResult | None:
            if self.regex is None:
                return None
            left = max(0.001, end - time.monotonic())
            found = regex.compile(self.regex.pattern).search(file, timeout=left)
            return RegexMatchResult(found) if found else None

    try:
        spec = pathspec.GitIgnoreSpec.from_lines(patterns.splitlines(), Bounded)
        found = []
        for path in paths:
            if spec.match_file(path):
                found.append(path)
            if time.monotonic() > end:
                raise TimeoutError
    except TimeoutError:
        raise HubRefusal(
            400, "Matching the paths with .gitignore takes too long; simplify its patterns, or commit fewer files."
        ) from None
    except ValueError as error:
        raise HubRefusal(400, f".gitignore cannot be read: {str(error)[:200]}.") from None
    return found
