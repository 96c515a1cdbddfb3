"""Builds a release and tries it as somebody else will: `python -m scripts.release --check`, or `--tag`.

Wheel and sdist are built from what git has, each is installed into a fresh environment, and the notes are the section of the
version in CHANGELOG.md. With `--tag` the tree must be clean, and the tag is made last. Nothing is uploaded.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
NEEDED = ("adapterhub_lite/py.typed", "adapterhub_lite/cli/main.py", "adapterhub_app/style.css")


class ReleaseError(Exception):
    """Why nothing was released."""


def current_version(root: Path = ROOT) -> str:
    """The version in the package, which has to be that of CITATION.cff.

    Raises:
        ReleaseError: they differ, or one has none.
    """
    package = re.search(r'^__version__ = "(.+)"$', (root / "adapterhub_lite/__init__.py").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    if package is None or cited is None or package[1] != cited[1]:
        raise ReleaseError("adapterhub_lite/__init__.py and CITATION.cff have to name the same version.")
    return package[1]


def notes(changelog: str, version: str, *, final: bool) -> str:
    """The section of `version`; before a release is `final`, that of what is unreleased stands for it.

    Raises:
        ReleaseError: there is no such section, or it is empty.
    """
    heads = [rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", *([] if final else [r"\[Unreleased\]"])]
    for head in heads:
        found = re.search(rf"^## {head}\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
        if found and found[1].strip():
            return found[1].strip() + "\n"
    raise ReleaseError(f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD` with anything in it.")


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command and return what it printed.

    Raises:
        ReleaseError: it failed.
    """
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(work: Path) -> list[Path]:
    """Build wheel and sdist of HEAD into `dist/`; returns their paths."""
    source = work / "source"
    source.mkdir()
    run("git", "archive", "--output", work / "source.tar", "HEAD")
    with tarfile.open(work / "source.tar") as archive:
        archive.extractall(source, filter="data")
    python = fresh_environment(work / "build")
    run(python, "-m", "pip", "--quiet", "install", "hatchling>=1.27")
    run(python, "-m", "hatchling", "build", "-d", work / "out", cwd=source)
    DIST.mkdir(exist_ok=True)
    return [path.replace(DIST / path.name) for path in sorted((work / "out").iterdir())]


def fresh_environment(folder: Path) -> Path:
    """The interpreter of a new, empty environment."""
    run(sys.executable, "-m", "venv", folder)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def try_out(built: Path, version: str, work: Path) -> None:
    """Install what was built alone, and use it.

    Raises:
        ReleaseError: it lacks a file, or does not work.
    """
    if built.suffix == ".whl":
        missing = set(NEEDED) - set(zipfile.ZipFile(built).namelist())
        if missing:
            raise ReleaseError(f"{built.name} lacks {', '.join(sorted(missing))}.")
    python = fresh_environment(work / built.name.replace(".", "-"))
    run(python, "-m", "pip", "--quiet", "install", "--constraint", ROOT / "constraints.txt", built)
    program = [python, "-m", "adapterhub_lite"]
    if run(*program, "--version", cwd=work).strip() != version:
        raise ReleaseError(f"{built.name} does not call itself {version}.")
    run(*program, "list", "--home", work / "home", cwd=work)
    run(*program, "doctor", "--home", work / "home", cwd=work)


def main() -> None:
    """Check, build, try, write the notes and perhaps tag; exit code 2 with one sentence where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    act = parser.add_mutually_exclusive_group(required=True)
    act.add_argument("--check", action="store_true", help="build and try, tag nothing")
    act.add_argument("--tag", action="store_true", help="build and try a clean tree, then tag it")
    chosen = parser.parse_args()
    try:
        version = current_version()
        text = notes((ROOT / "CHANGELOG.md").read_text(), version, final=chosen.tag)
        if chosen.tag and run("git", "status", "--porcelain"):
            raise ReleaseError("The working tree has changes that are not committed.")
        if chosen.tag and run("git", "tag", "--list", f"v{version}"):
            raise ReleaseError(f"There is a tag v{version} already.")
        with tempfile.TemporaryDirectory() as folder:
            for built in build(Path(folder)):
                try_out(built, version, Path(folder))
                print(f"{built}: works in a fresh environment")
        written = DIST / f"notes-{version}.md"
        written.write_text(text)
        print(f"{written}: the notes")
        if chosen.tag:
            run("git", "tag", "--annotate", f"v{version}", "--file", written)
            print(f"v{version} is tagged. Push it, and upload dist/*, when you want it public.")
    except ReleaseError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
