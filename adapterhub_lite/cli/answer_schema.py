"""The schema that an adapter's answers follow, read from a file for `add` and `train`."""

from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.strict_reading import strict_json
from adapterhub_lite.errors import UsageError
from adapterhub_lite.installation import missing_extra


def read_answer_schema(path: Path | None) -> dict[str, Any] | None:
    """The JSON schema in a file, checked as serving will; None without a file.

    Raises:
        UsageError: there is no such file, or its schema is not one that answers can follow.
    """
    if path is None:
        return None
    try:
        from adapterhub_lite.serving.engine.forms import MOST_CHARACTERS, check_form
        from adapterhub_lite.serving.engine.request import schema_form
    except ModuleNotFoundError as error:
        raise missing_extra("Checking a schema", "models") from error
    try:
        schema = strict_json(path.read_bytes(), what=path.name, limit=4 * MOST_CHARACTERS["schema"])
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Give a file with a JSON schema.") from error
    except ValueError as error:
        raise UsageError(f"{error}. Give a file with a JSON schema.") from error
    check_form(schema_form(schema))
    return schema
