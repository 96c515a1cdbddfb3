"""JSON from strangers: bounded, no duplicate keys, no NaN, objects only. Knows nothing of what it reads."""

import json
from typing import Any


def strict_json(content: bytes, *, what: str, limit: int) -> dict[str, Any]:
    """Parse a JSON object of at most `limit` bytes.

    Raises:
        ValueError: too long, not UTF-8, not JSON, nested too deep, a key twice, NaN or infinity, or not an object.
    """
    if len(content) > limit:
        raise ValueError(f"{what} has {len(content)} bytes, at most {limit} are read")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{what} is nested too deep") from None
    except _NotStrictError as error:
        raise ValueError(f"{what} {error}") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object but a {type(found).__name__}")
    return found


class _NotStrictError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrictError(f"has the key {twice!r:.80} twice")
    return found


def _no_constant(text: str) -> Any:
    raise _NotStrictError(f"holds {text}, which is not JSON")
