"""Which modules a LoRA configuration means: PEFT's rules for names and patterns, bounded in time.

A pattern is a regular expression from whoever wrote the file, and Python's `re` may take forever over one. The rules
are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`), on an engine that gives up.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, TypeVar

import regex
from pydantic import AfterValidator, StringConstraints

Value = TypeVar("Value")

# For all patterns of one question and all modules of a base together; honest ones take milliseconds.
MATCH_SECONDS = 2.0
MAX_PATTERN = 2000
# `a{1000}{1000}` is unrolled when it is compiled, so counts are bounded together.
MAX_REPEATS = 1000
REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
PLAIN_NAME = r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"


class PatternError(ValueError):
    """A pattern that is no regular expression, or that takes too long."""


@lru_cache(maxsize=4096)
def is_plain(name: str) -> bool:
    """Whether `name` is the name of a module or its ending, and no pattern."""
    return re.fullmatch(PLAIN_NAME, name) is not None


def checked(pattern: str) -> str:
    """`pattern`, which Python's `re` has to compile too: PEFT uses that.

    Raises:
        PatternError: it is no regular expression, or unrolls into a huge one.
    """
    repeats = math.prod(max(int(n) for n in pair if n) for pair in REPEAT.findall(pattern) if any(pair))
    try:
        if repeats > MAX_REPEATS:
            raise PatternError(f"{pattern!r:.80} repeats parts of itself {min(repeats, 10**9)} times")
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{pattern!r:.80} is no regular expression: {error!s:.80}") from None
    return pattern


ModuleName = Annotated[str, StringConstraints(pattern=rf"^{PLAIN_NAME}$", max_length=200)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN), AfterValidator(checked)]


def named(names: Sequence[str] | str | None, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that `names` mean: a pattern has to fit a whole name, a list holds names or their endings.

    Raises:
        PatternError: the pattern takes too long.
    """
    if not names:
        return set()
    if isinstance(names, str):
        clock = _Clock()
        return {module for module in modules if clock.match(names, module, whole=True)}
    whole, endings = frozenset(names), tuple(f".{name}" for name in names)
    return {module for module in modules if module in whole or module.endswith(endings)}


def values_for(patterns: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    """The value of the first key of `patterns` that fits the end of each module, from a dot on; others are left out.

    Raises:
        PatternError: a pattern takes too long.
    """
    clock = _Clock()
    found = {}
    for module in modules:
        for key, value in patterns.items():
            if _ends_with(module, key) if is_plain(key) else clock.match(rf"(.*\.)?({key})$", module):
                found[module] = value
                break
    return found


def layer_indices(modules: Iterable[str], layers_pattern: Sequence[str] | str | None) -> dict[str, int]:
    """The index of the layer that each module lies in: the first number in its name, or the one behind a pattern.

    Raises:
        PatternError: a pattern takes too long.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    forms = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    clock = _Clock()
    found = {}
    for module in modules:
        match = next((match for form in forms if (match := clock.match(form, module))), None)
        if match:
            found[module] = int(match["idx"])
    return found


class _Clock:
    """Matches until this thread has computed for so long."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MATCH_SECONDS

    def match(self, pattern: str, text: str, *, whole: bool = False) -> "regex.Match[str] | None":
        compiled = _compiled(pattern)
        try:
            if time.thread_time() > self._end:
                raise TimeoutError
            look = compiled.fullmatch if whole else compiled.match
            return look(text, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise PatternError(f"the pattern {pattern!r:.80} takes too long on {text!r:.80}") from None


def _ends_with(module: str, key: str) -> bool:
    """What `(.*\\.)?(key)$` says of a plain `key`, in which a dot fits any character."""
    before, tail = len(module) - len(key), module[-len(key) :]
    if before < 0 or (before > 0 and module[before - 1] != "."):
        return False
    return tail == key or ("." in key and all(k in (".", t) for k, t in zip(key, tail, strict=True)))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern, flags=regex.VERSION0)
