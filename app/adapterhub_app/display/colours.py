"""The colour of a task: the same for all versions and aliases of an adapter, another for every adapter on the cards."""

import re
import zlib
from collections.abc import Iterable, Mapping

from adapterhub_app.display.task import BASE
from adapterhub_lite.registry import AdapterManifest

# So many colours of tasks style.css has.
COLOURS = 8


def task_colours(manifests: Iterable[AdapterManifest]) -> dict[str, int]:
    """Adapter name -> number of its colour, for the first `COLOURS` names, which are those on the cards.

    In the order in which they were added, so that a new adapter takes no other's colour.
    """
    added: dict[str, str] = {}
    for manifest in manifests:
        added[manifest.name] = min(manifest.created, added.get(manifest.name, manifest.created))
    taken: dict[str, int] = {}
    for name in sorted(sorted(added)[:COLOURS], key=lambda name: (added[name], name)):
        free = [number for number in range(COLOURS) if number not in taken.values()]
        taken[name] = min(free, key=lambda number: (number - _own(name)) % COLOURS)
    return taken


def colour_of(name: str, colours: Mapping[str, int]) -> str:
    """The class of style.css that colours a task, given by its displayed name; of a blend, that of its first adapter."""
    if name in (BASE, "base"):
        return "task-base"
    adapter = re.split(r"[:@*+ ]", name.partition("×")[2] or name, maxsplit=1)[0]
    return f"task-{colours.get(adapter, _own(adapter))}"


def _own(adapter: str) -> int:
    """The colour that a name would have if it were alone."""
    return zlib.crc32(adapter.encode()) % COLOURS
