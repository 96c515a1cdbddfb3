"""The shape of the house: imports go one way, starting is cheap, the README's tree is the tree there is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adapterhub_lite"

# room -> the rooms it may import; what lies below everything is in FOUNDATION.
FOUNDATION = {"errors", "home", "record", "setting", "bases", "canary"}
ALLOWED = {
    "errors": set(),
    "home": set(),
    "setting": set(),
    "record": {"errors"},
    "bases": {"errors", "home"},
    "canary": {"errors", "record"},
    "diagnosis": {"home", "memory", "record"},
    "tasks": {"errors"},
    "recipe": {"errors", "setting"},
    "quiet": set(),
    "evaluation": {"errors", "bases", "tasks", "training", "registry", "serving"},
    "losses": FOUNDATION,
    "memory": FOUNDATION,
    "training": FOUNDATION | {"losses", "memory", "recipe", "tasks"},
    "registry": FOUNDATION,
    "merging": FOUNDATION | {"registry"},
    "serving": FOUNDATION | {"registry"},
    "hub_server": {"errors"},
}
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
        "app" for p in parts if p[0] == "app"
    }


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        extra = rooms_imported(file) - ALLOWED[room] - {room}
        assert not extra, f"{file.relative_to(ROOT)} imports {sorted(extra)}"


def test_only_the_command_line_imports_the_command_line_and_the_app() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "cli" not in file.relative_to(PACKAGE).parts and file.name != "__main__.py":
            assert not rooms_imported(file) & {"cli", "app"}, file


def test_every_room_is_in_the_table() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "cli"} == set(ALLOWED)


@pytest.mark.parametrize("module", ["adapterhub_lite", "adapterhub_lite.cli.main", "adapterhub_lite.registry"])
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
