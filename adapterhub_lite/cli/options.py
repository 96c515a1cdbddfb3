"""Command-line options and YAML keys derived from a dataclass, so that each setting is described once."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from adapterhub_lite.errors import ConfigurationError

Settings = TypeVar("Settings")


def options_from(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a verb so that each field of the dataclass `settings` becomes an option of it.

    The verb receives `given: dict[str, Any]`: only what the user wrote on the command line. A field's help text is its
    `metadata["help"]`; its default is shown in the help and applied by `build_settings`.
    """
    hints = get_type_hints(settings)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "given"]
        derived = [_parameter(field, hints[field.name]) for field in fields(settings)]

        def wrapper(**arguments: Any) -> None:
            given = {p.name: value for p in derived if (value := arguments.pop(p.name)) is not None}
            verb(given=given, **arguments)

        wrapper.__name__, wrapper.__doc__ = verb.__name__, verb.__doc__
        # Typer reads the signature and the annotations; both must name the derived options.
        wrapper.__signature__ = inspect.Signature([*own, *derived])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *derived]}
        return wrapper

    return decorate


def _parameter(field: "Field[Any]", kind: Any) -> inspect.Parameter:
    name = "--" + field.name.replace("_", "-")
    flag = f"{name}/--no-{name[2:]}" if kind is bool else name
    option = typer.Option(flag, help=f"{field.metadata['help']}  [default: {_default(field)}]", show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(field: "Field[Any]") -> Any:
    return "required" if field.default is MISSING else field.default


def build_settings(settings: type[Settings], given: dict[str, Any], config: Path | None) -> Settings:
    """Build the dataclass from a YAML file and what was given on the command line, which wins.

    Raises:
        ConfigurationError: the file cannot be read, or has a key or a value that the dataclass does not know.
    """
    from pydantic import TypeAdapter, ValidationError

    known = get_type_hints(settings)
    from_file = _read_yaml(config) if config else {}
    unknown = sorted(set(from_file) - set(known))
    if unknown:
        raise ConfigurationError(f"{config}: unknown setting {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    for key, value in from_file.items():
        try:
            TypeAdapter(known[key]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = getattr(known[key], "__name__", None) or str(known[key])
            raise ConfigurationError(f"{config}: {key} is {value!r}, expected {expected}.") from error
    return settings(**{**from_file, **given})


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} could not be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no settings: wanted lines of the form `rank: 8`.")
    return content
