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

    The verb receives `given: dict[str, Any]`: only the options that the user wrote. A field's help text is its
    `metadata["help"]`; its default is shown in the help and applied by `build_settings`.
    """
    hints = get_type_hints(settings)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "given"]
        derived = [parameter_of(field, hints[field.name]) for field in fields(settings)]

        def wrapper(**arguments: Any) -> None:
            given = {p.name: value for p in derived if (value := arguments.pop(p.name)) is not None}
            verb(given=given, **arguments)

        wrapper.__name__, wrapper.__doc__ = verb.__name__, verb.__doc__
        # Typer reads the signature and the annotations; both must name the derived options.
        wrapper.__signature__ = inspect.Signature([*own, *derived])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *derived]}
        return wrapper

    return decorate


def parameter_of(field: "Field[Any]", kind: Any) -> inspect.Parameter:
    """The option of one field, as a parameter that Typer understands; `kind` is the field's type."""
    default = "required" if field.default is MISSING else field.default
    name = "--" + field.name.replace("_", "-")
    flag = f"{name}/--no-{name[2:]}" if kind is bool else name
    option = typer.Option(flag, help=f"{field.metadata['help']}  [default: {default}]", show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def build_settings(settings: type[Settings], given: dict[str, Any], config: Path | None) -> Settings:
    """Build the dataclass from a YAML file and what was given on the command line, which wins.

    Raises:
        ConfigurationError: the file cannot be read, or has an unknown key or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    known = get_type_hints(settings)
    from_file: dict[str, Any] = {}
    if config:
        import yaml

        try:
            from_file = yaml.safe_load(config.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{config} could not be read as YAML: {error}") from error
        if not isinstance(from_file, dict):
            raise ConfigurationError(f"{config} contains no settings: expected lines such as `rank: 8`.")
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
