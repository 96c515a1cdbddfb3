"""How this package was installed, which of its extras a package belongs to, and what to type to get it. Imports nothing heavy.

The core (registry, hub, command line) needs no torch; everything else comes with an extra of `pyproject.toml`.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlparse

from adapterhub_lite.errors import MissingExtraError

NAME = "adapterhub-lite"
CHECKOUT = Path(__file__).resolve().parents[1]
# The extra that each room needs. What all rooms use, such as `bases`, is asked for by one of these.
EXTRA_OF_ROOM: Mapping[str, str] = {
    "evaluation": "train",
    "hub_server": "serve",
    "losses": "train",
    "memory": "train",
    "merging": "models",
    "serving": "serve",
    "training": "train",
}
# Packages whose module has another name.
MODULES: Mapping[str, str] = {"markdown-it-py": "markdown_it", "pyyaml": "yaml"}


def install_command(extra: str) -> str:
    """What installs `extra` into this environment, from where the package itself was installed."""
    if _is_checkout(CHECKOUT):
        # An editable install stays one.
        return f"{installer()} -e {shlex.quote(f'{CHECKOUT}[{extra}]')}"
    found = _installed()
    source = _from_its_source(found, extra) if found else None
    return f"{installer()} {shlex.quote(source or f'{NAME}[{extra}]')}"


def installer() -> str:
    """The command of the tool that manages this environment, up to what is to be installed."""
    python = shlex.quote(sys.executable)
    found = _installed()
    tool = (found.read_text("INSTALLER") or "").strip() if found else ""
    if "pipx" in Path(sys.prefix).parts:
        return f"pipx runpip {NAME} install"
    if tool == "uv":
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"


def missing_extra(what: str, extra: str) -> MissingExtraError:
    """The error that says that `what` needs an extra, and how to get it."""
    return MissingExtraError(f"{what} needs packages that are not installed. Get them with: {install_command(extra)}")


def explain_missing(error: ModuleNotFoundError, what: str = "This") -> MissingExtraError | None:
    """The sentence for a package that could not be imported; None where no extra has it: then it is a defect.

    The room that asked for it says which extra, as the traceback of `error` has it.
    """
    package = (error.name or "").partition(".")[0]
    extras = extras_with(package)
    if not extras:
        return None
    rooms = [room for room in _rooms(error.__traceback__) if EXTRA_OF_ROOM.get(room) in extras or room == "app"]
    wanted = "app" if "app" in rooms else EXTRA_OF_ROOM[rooms[0]] if rooms else extras[0]
    return missing_extra(what, wanted)


def extras_with(module: str) -> list[str]:
    """The extras that bring the top-level `module`, those first that bring least; empty where none does."""
    extras = _extras()
    found = [name for name, packages in extras.items() if module in _closure(name, extras)]
    return sorted(found, key=lambda name: len(_closure(name, extras)))


def _closure(extra: str, extras: Mapping[str, set[str]]) -> set[str]:
    """The modules of an extra and of the extras that it names."""
    found: set[str] = set()
    for name in extras.get(extra, ()):
        found |= _closure(name[1:], extras) if name.startswith("@") else {name}
    return found


def _extras() -> dict[str, set[str]]:
    """Extra -> its modules, and `@other` for an extra that it includes."""
    extras: dict[str, set[str]] = {}
    for line in _requirements():
        match = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?[^;]*;.*extra == [\"']([\w-]+)[\"']\)?", line)
        if match is None:
            continue
        package, included, extra = match[1].lower(), match[2], match[3]
        names = {f"@{one}" for one in included.split(",")} if package == NAME and included else {_module(package)}
        extras.setdefault(extra, set()).update(names)
    return {name: modules for name, modules in extras.items() if name not in ("all", "dev")}


def _requirements() -> list[str]:
    if _is_checkout(CHECKOUT):
        import tomllib

        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
        return [
            f"{line.partition(';')[0].strip()}; extra == '{extra}'"
            for extra, lines in project["optional-dependencies"].items()
            for line in lines
        ]
    found = _installed()
    return (found.requires or []) if found else []


def _module(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def _rooms(trace: TracebackType | None) -> list[str]:
    """The rooms that a traceback passes, outermost first; the app's is `app`."""
    rooms = []
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        parts = name.split(".")
        if parts[0] == "adapterhub_app":
            rooms.append("app")
        elif parts[0] == "adapterhub_lite" and len(parts) > 1:
            rooms.append(parts[1])
        trace = trace.tb_next
    return rooms


def _installed() -> Distribution | None:
    try:
        return distribution(NAME)
    except PackageNotFoundError:
        return None


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "constraints.txt").is_file()


def _from_its_source(found: Distribution, extra: str) -> str | None:
    """The requirement by the address the package was installed from (PEP 610); None where it came from an index."""
    written = found.read_text("direct_url.json")
    if written is None:
        return None
    source = json.loads(written)
    url = str(source["url"])
    if "vcs_info" in source:
        commit = source["vcs_info"].get("commit_id")
        return f"{NAME}[{extra}] @ {source['vcs_info']['vcs']}+{url}{f'@{commit}' if commit else ''}"
    if url.startswith("file://") and "dir_info" in source:
        folder = Path(unquote(urlparse(url).path))
        return f"{folder}[{extra}]" if folder.exists() else None
    return f"{NAME}[{extra}] @ {url}"
