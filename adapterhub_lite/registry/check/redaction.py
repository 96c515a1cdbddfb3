"""Local paths, and with them user names, out of what may be published; and what JSON cannot say. Knows values only."""

import math
import re
from typing import TypeVar

Json = TypeVar("Json", bound=object)

# An absolute path of at least two parts, POSIX, home-relative or Windows; not the path of a URL.
LOCAL_PATH = re.compile(
    r"(?<![\w:/.\\<])(?:file://)?(?:[A-Za-z]:[\\/]|~[\\/]|/)(?:[^\s/\\'\"<>|,;]{1,255}[\\/]){1,64}([^\s/\\'\"<>|,;]{0,255})"
)


def scrub(value: Json) -> Json:
    """Copy a JSON value with every local path replaced by its last part (`/home/ann/rows.jsonl` -> `rows.jsonl`)."""
    if isinstance(value, str):
        return LOCAL_PATH.sub(lambda match: match[1] or "folder", value)  # type: ignore[return-value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # type: ignore[return-value] # no JSON has a word for it
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]  # type: ignore[return-value]
    return value
