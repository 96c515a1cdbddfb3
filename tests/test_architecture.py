"""The shape of the house: imports go one way, starting is cheap, the README's tree is the tree there is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT

PACKAGE = ROOT / "adapterhub_lite"

# room -> the rooms it may import; what lies below everything is in FOUNDATION.
FOUNDATION = {"devices", "errors", "files", "home", "installation", "native", "setting", "adapter_format", "bases"}
ALLOWED = {
    "devices": set(),
    "errors": set(),
    "files": set(),
    "home": set(),
    "installation": {"errors"},
    "native": set(),
    "setting": set(),
    "quiet": set(),
    "web": {"errors"},
    "adapter_format": {"errors"},
    "bases": {"errors", "home", "adapter_format", "files"},
    "tasks": {"errors"},
    "loss_sizes": set(),
    "losses": FOUNDATION | {"loss_sizes"},
    "memory": FOUNDATION | {"loss_sizes"},
    "runs": FOUNDATION,
    "training": FOUNDATION | {"losses", "memory", "runs", "tasks"},
    "registry": FOUNDATION,
    "merging": FOUNDATION | {"registry"},
    "serving": FOUNDATION | {"registry", "web"},
    "hub_server": {"errors", "files", "web"},
    "diagnosis": FOUNDATION | {"memory"},
    "evaluation": FOUNDATION | {"tasks", "training", "registry", "serving"},
}
# Inside a room: the folders and files in the order in which they may import, lowest first; a row is one level.
LEVELS = {
    "registry": (("store",), ("operations",), ("hub",), ("registry",)),
    "serving": (("adapters",), ("model",), ("engine",), ("api",), ("cluster",), ("vllm",)),
    "training": (
        ("settings", "porting"),
        ("arguments", "evaluation"),
        ("data", "model", "distributed"),
        ("run",),
        ("samples",),
        ("report",),
        ("trainer",),
        ("recipe",),
        ("sweep",),
    ),
    "cli": (("output", "options"), ("train", "keep", "share", "serve", "machine"), ("main",)),
}
# Rooms whose files still import each other in a circle. Empty this; never add to it.
CIRCULAR: set[str] = set()
# A device is compared with a maker's name here, and nowhere else.
MAKERS = re.compile(r"torch\.(cuda|xpu|mps)\b|[=!]= \"(cuda|xpu|mps)\"")
LAZY_AT_IMPORT = ("torch", "transformers", "peft", "gradio", "datasets", "huggingface_hub")


def imported_modules(path: Path) -> set[str]:
    """Every module that the file names in an import, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported_modules(path)]
    known = set(ALLOWED) | {"cli"}
    return {p[1] for p in parts if p[0] == "adapterhub_lite" and len(p) > 1 and p[1] in known} | {
        "app" for p in parts if p[0] == "adapterhub_app"
    }


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        extra = rooms_imported(file) - ALLOWED[room] - {room}
        assert not extra, f"{file.relative_to(ROOT)} imports {sorted(extra)}"


def module_of(path: Path) -> str:
    """The dotted name of a file of the package; a package is its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_between_files() -> dict[str, set[str]]:
    """Every file of the package with the files it imports, those under TYPE_CHECKING and inside functions too."""
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {name: {m for m in imported_modules(path) if m in files and m != name} for name, path in files.items()}


@pytest.mark.parametrize("room", sorted(LEVELS))
def test_inside_a_room_imports_go_one_way(room: str) -> None:
    if room in CIRCULAR:
        pytest.skip("this room still imports in a circle")
    levels = {part: level for level, parts in enumerate(LEVELS[room]) for part in parts}
    prefix = f"adapterhub_lite.{room}."
    for name, imported in imports_between_files().items():
        if not name.startswith(prefix):
            continue
        level = levels.get(name.removeprefix(prefix).split(".")[0], -1)
        for other in imported:
            if other.startswith(prefix):
                below = levels.get(other.removeprefix(prefix).split(".")[0], -1)
                assert below <= level, f"{name} imports {other}, which lies above it"


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        name: imported
        for name, imported in imports_between_files().items()
        if name.split(".")[1:2] and name.split(".")[1] not in CIRCULAR
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, (*path, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_only_the_command_line_imports_the_command_line_and_the_app() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "cli" not in file.relative_to(PACKAGE).parts and file.name != "__main__.py":
            assert not rooms_imported(file) & {"cli", "app"}, file


def test_every_room_is_in_the_table() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "cli"} == set(ALLOWED)


@pytest.mark.parametrize(
    "module",
    [
        "adapterhub_lite",
        "adapterhub_lite.cli.main",
        "adapterhub_lite.registry",
        "adapterhub_lite.training.settings",
        "adapterhub_lite.runs.starting",
    ],
)
def test_starting_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {LAZY_AT_IMPORT!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_readme_tree_names_what_is_there() -> None:
    block = re.search(r"## What is where\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has no '## What is where' tree"
    listed = {line.split()[0].rstrip("/") for line in block[1].splitlines() if line and not line.startswith(" ")}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    present = {name.split("/")[0] for name in tracked.splitlines() if not name.startswith(".")}
    assert listed == present
    rooms = set(re.findall(r"^  (\w+)(?:/|\.py) ", block[1], re.MULTILINE))
    there = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix in (".py", "")}
    assert rooms == there


def test_the_public_names_are_a_list_and_each_can_be_imported() -> None:
    import adapterhub_lite

    assert adapterhub_lite.__all__ == sorted(adapterhub_lite.__all__)
    for name in adapterhub_lite.__all__:
        value = getattr(adapterhub_lite, name)
        assert value.__doc__ or not callable(value), f"{name} has no docstring"


SEAM = re.compile(r"\b(registry|store|trainer|engine|runner|pool|manifest|server): \"?Any\b")


def test_what_rooms_hand_each_other_has_a_type() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "app").rglob("*.py")]
        for line in path.read_text().splitlines()
        if SEAM.search(line) and "#" not in line
    ]
    assert not found


def test_what_a_device_can_do_is_asked_in_one_place() -> None:
    """So that ROCm, XPU and MPS go the way that CUDA goes, where torch has it."""
    found = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if MAKERS.search(path.read_text())]
    assert found == ["devices.py"]
