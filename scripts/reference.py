"""The reference, written from the code: settings, verbs, errors, the HTTP API, public names.

A page of `docs/` asks for a part with `{{ reference.PART ARGUMENT }}`, as in `{{ reference.settings
adapterhub_lite.training.settings.TrainingRecipe }}`; `scripts/docs_hooks.py` puts it there when the site is built. Each
fact stands once, where the code has it: a setting with its help, a verb with its options, an error with what to do.
"""

import ast
import inspect
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

from typer.models import ArgumentInfo, ParameterInfo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PLACE = re.compile(r"\{\{ reference\.(\w+)(?: ([\w.]+))? \}\}")
TO_DO = re.compile(r"\s*To do: (.+)", re.DOTALL)
# Pages that list everything explain nothing.
LISTS = ("api/", "index.md", "architecture.md")


def fill_reference(markdown: str, page: str = "") -> str:
    """Replace every place of `markdown` that asks for a part of the reference; `page` is its path under `docs`."""

    def filled(match: re.Match[str]) -> str:
        part, argument = match.groups()
        return PARTS[part](argument, page) if argument else PARTS[part]("", page)

    return PLACE.sub(filled, markdown)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; what would end a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell(one) for one in line)} |" for line in lines)


def cell(text: object) -> str:
    """One cell: on one line, without a bar that would end it, and without what would be taken for HTML."""
    plain = re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")
    # Inside of backticks nothing is taken for HTML.
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(plain.split("`")))


def settings_table(name: str, page: str) -> str:
    """Every setting of a dataclass: name, default, meaning and the page that explains it."""
    described = [one for one in fields(found_at(name)) if "help" in one.metadata and not _is_transformers(one.metadata)]
    rows = []
    for one in described:
        default = "required" if one.default is MISSING else f"`{one.default!r}`"
        rows.append((f"`{one.name}`", default, one.metadata["help"], explained(one.name, page)))
    return table(("setting", "default", "meaning", "more"), rows)


def _is_transformers(metadata: Any) -> bool:
    # Its own documentation has its settings, with help texts of several lines.
    return "\n" in str(metadata["help"]).strip()


def changed_defaults(name: str, page: str) -> str:
    """The settings that a class takes from another with a default of its own."""
    kind = found_at(name)
    parents = {one.name: one.default for parent in kind.__mro__[1:] if is_dataclass(parent) for one in fields(parent)}
    own = [one for one in fields(kind) if one.name in kind.__annotations__ and one.name in parents]
    rows = [(f"`{one.name}`", f"`{one.default!r}`", f"`{parents[one.name]!r}`") for one in own]
    return table(("setting", "here", "in transformers"), rows)


def explained(name: str, page: str) -> str:
    """A link to the page that says most of a setting, or nothing."""
    words = re.compile(rf"`{re.escape(name)}\b|--{re.escape(name.replace('_', '-'))}\b|\b{re.escape(name)}=")
    counted = []
    for path in sorted(DOCS.rglob("*.md")):
        found = path.relative_to(DOCS).as_posix()
        if not found.startswith(LISTS) and (times := len(words.findall(path.read_text()))):
            counted.append((-times, found))
    if not counted:
        return ""
    best = min(counted)[1]
    return f"[{title_of(DOCS / best)}]({'../' * page.count('/')}{best})"


def title_of(page: Path) -> str:
    """The heading of a page."""
    return page.read_text().partition("\n")[0].removeprefix("# ").strip()


def verbs(_: str, page: str) -> str:
    """Every verb of the command line: what it does, an example, its arguments and options."""
    from adapterhub_lite.cli.main import PANELS, VERBS

    parts = []
    for title, names in PANELS.items():
        parts.append(f"## {title}\n")
        parts += [verb_section(name, VERBS[name], page) for name in names]
    return "\n".join(parts)


def verb_section(name: str, verb: Callable[..., None], page: str) -> str:
    """One verb with its options in a table."""
    text, _, example = inspect.cleandoc(verb.__doc__ or "").partition("Example:")
    lines = [f"### {name}\n", text.strip(), ""]
    if example:
        lines += [f"Example: {' '.join(example.split())}", ""]
    rows = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        info = next(one for one in get_args(parameter.annotation) if isinstance(one, ParameterInfo))
        rows.append(option_row(parameter, info))
    lines.append(table(("argument or option", "takes", "default", "meaning"), rows) if rows else "")
    return "\n".join(lines) + "\n"


def option_row(parameter: inspect.Parameter, info: ParameterInfo) -> tuple[str, str, str, str]:
    """One argument or option: how it is written, of which type, its default and its help."""
    # Typer takes the first name that is given for a default.
    written = [one for one in (info.default, *(info.param_decls or ())) if str(one).startswith("-")]
    names = [parameter.name.upper()] if isinstance(info, ArgumentInfo) else written
    names = names or ["--" + parameter.name.replace("_", "-")]
    kind = type_name(get_args(parameter.annotation)[0])
    help_text, _, told = (info.help or "").partition("  [default: ")
    given = parameter.default not in (inspect.Parameter.empty, None, False)
    default = told.rstrip("]") or (str(parameter.default) if given else "")
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    return ", ".join(f"`{one}`" for one in names), kind, f"`{default}`" if default else "", help_text


def type_name(kind: Any) -> str:
    """A type as a person says it: `text`, `number`, a choice of words, or nothing for a flag."""
    names = {str: "text", int: "whole number", float: "number", bool: "", Path: "path"}
    if kind in names:
        return names[kind]
    if get_origin(kind) is list:
        return f"{type_name(get_args(kind)[0])}, repeated"
    choices = [one for one in get_args(kind) if one is not type(None)]
    if all(isinstance(one, str) for one in choices) and choices:
        return ", ".join(f"`{one}`" for one in choices)
    return " or ".join(filter(None, (type_name(one) for one in choices)))


def errors(_: str, page: str) -> str:
    """Every error: what it means, and what to do."""
    rows = []
    for depth, kind in error_tree():
        meaning, to_do = error_text(kind)
        rows.append((f"{'&nbsp;' * 4 * depth}`{kind.__name__}`", meaning, to_do))
    # The spaces that show the tree are markup, not text.
    return table(("error", "means", "what to do"), rows)


def error_text(kind: type[Exception]) -> tuple[str, str]:
    """What an error's docstring says that it means, and what to do about it.

    Raises:
        ValueError: the docstring does not say what to do.
    """
    text = inspect.cleandoc(kind.__doc__ or "")
    meaning, _, rest = text.partition("\n\n")
    to_do = TO_DO.match(rest)
    if to_do is None:
        raise ValueError(f"The docstring of {kind.__name__} has no paragraph `To do: ...`.")
    return meaning, to_do[1]


def error_tree() -> Iterator[tuple[int, type[Exception]]]:
    """Every error of the project with its depth in the tree, in the order of the file."""
    from adapterhub_lite.errors import AdapterHubError

    def below(kind: type[Exception], depth: int) -> Iterator[tuple[int, type[Exception]]]:
        yield depth, kind
        for child in kind.__subclasses__():
            if child.__module__ == "adapterhub_lite.errors":
                yield from below(child, depth + 1)

    yield from below(AdapterHubError, 0)


def http_api(_: str, page: str) -> str:
    """Every route of the server with the fields of its body, from the schema that the server itself hands out."""
    schema = server_schema()
    models = schema["components"]["schemas"]
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            about = re.sub(r"^[A-Z]+ /\S+: ", "", route.get("description") or f"{route['summary']}.")
            parts.append(f"## {method.upper()} {path}\n\n{about}\n")
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if model := models.get(content.get("$ref", "").rpartition("/")[2]):
                parts.append(fields_table(model, models) + "\n")
    named = sorted({name for text in parts for name in re.findall(r"\[`(\w+)`\]", text)})
    for name in named:
        parts.append(f"## {name}\n\n{models[name].get('description', '')}\n\n{fields_table(models[name], models)}\n")
    return "\n".join(parts)


def server_schema() -> dict[str, Any]:
    """The OpenAPI document of the server; nothing is loaded."""
    from adapterhub_lite.registry import AdapterRegistry
    from adapterhub_lite.serving.api.app import create_api
    from adapterhub_lite.serving.api.settings import ServerSettings

    with tempfile.TemporaryDirectory() as home:
        # The routes are the same whatever engine answers them.
        engine: Any = object()
        app = create_api(engine, AdapterRegistry(home), ServerSettings())
        found: dict[str, Any] = app.openapi()
        app.state.api.dispatcher.close()
    return found


def fields_table(model: dict[str, Any], models: dict[str, Any]) -> str:
    """The fields of one model of the schema."""
    required = model.get("required", [])
    rows = []
    for name, one in model.get("properties", {}).items():
        default = (
            "required" if name in required else f"`{one.get('default')!r}`" if one.get("default") is not None else ""
        )
        rows.append((f"`{name}`", json_type(one), default, one.get("description", "")))
    return table(("field", "takes", "default", "meaning"), rows)


def json_type(one: dict[str, Any]) -> str:
    """The type of a field with its limits; a model of the schema is linked."""
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    if "anyOf" in one:
        choices = (json_type(each) for each in one["anyOf"] if each.get("type") != "null")
        return " or ".join(dict.fromkeys(choices)) or "nothing"
    if "enum" in one or "const" in one:
        return ", ".join(f"`{value}`" for value in one.get("enum", [one.get("const")]))
    if one.get("type") == "array":
        return f"list of {json_type(one.get('items', {}))}" + limits(one, "Items", " items")
    kinds = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return kinds.get(str(one.get("type")), "anything") + limits(one, "Length", " characters") + limits(one, "imum", "")


def limits(one: dict[str, Any], of: str, unit: str) -> str:
    """The bounds of a value in words."""
    low = one.get(f"min{of}", one.get("exclusiveMinimum") if of == "imum" else None)
    high = one.get(f"max{of}", one.get("exclusiveMaximum") if of == "imum" else None)
    said = [f"from {low:g}"] if low is not None else []
    said += [f"up to {high:g}"] if high is not None else []
    return f", {' '.join(said)}{unit}" if said else ""


def names(module: str, page: str) -> str:
    """A directive of mkdocstrings for each public name of a room: none can be forgotten."""
    room = import_module(module)
    return "\n\n".join(f"::: {path_of(room, name)}" for name in room.__all__ if documented_here(room, name))


def documented_here(room: ModuleType, name: str) -> bool:
    """Whether a public name of a room is defined in it, and not only handed on."""
    return path_of(room, name).startswith(room.__name__)


def path_of(room: ModuleType, name: str) -> str:
    """Where a public name is defined, as a dotted path."""
    value = getattr(room, name)
    if getattr(value, "__module__", "").startswith("adapterhub_lite") and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # A constant: the file that assigns it.
    for path, module in sorted(sys.modules.items()):
        if path.startswith(room.__name__) and name in vars(module) and _assigns(module, name):
            return f"{path}.{name}"
    return f"{room.__name__}.{name}"


def _assigns(module: ModuleType, name: str) -> bool:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    targets = [
        *(target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets),
        *(node.target for node in tree.body if isinstance(node, ast.AnnAssign)),
    ]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def found_at(path: str) -> Any:
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def extras(_: str, page: str) -> str:
    """Every extra: what it is for and what it brings."""
    from adapterhub_lite.diagnosis import EXTRAS

    purposes = {name: purpose for name, _, purpose in EXTRAS}
    purposes |= {
        "models": "what reads a base: merges, probes, subspaces; part of the next three",
        "all": "all of these",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = [
        (f"`[{name}]`", purposes[name].partition(";")[0], ", ".join(re.split(r"[>=<; ]", one)[0] for one in lines))
        for name, lines in project.items()
        if name != "dev"
    ]
    return table(
        ("extra", "for", "brings"), [(name, why, what.replace("adapterhub-lite", "")) for name, why, what in rows]
    )


PARTS: dict[str, Callable[[str, str], str]] = {
    "changed": changed_defaults,
    "errors": errors,
    "extras": extras,
    "http": http_api,
    "names": names,
    "settings": settings_table,
    "verbs": verbs,
}
