"""Collect what a bare GPU machine does not have, for `scripts/gpu_check.sh` to find: at most 64 MiB of wheels.

    python -m scripts.gpu_check.wheels                       # for Python 3.12 and CUDA 13.0, into .gpu-wheels
    python -m scripts.gpu_check.wheels --python 3.11 --cuda 128

Run it where a package index can be reached; the folder is then copied to the machine with the checkout. bitsandbytes is
stripped to the library of one CUDA version and of the CPU. What is carried goes before what the machine has: these are the
versions that were tested together. torch, triton and numpy are the machine's own.
"""

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.gpu_check.__main__ import CARRIED

MOST_BYTES = 64 << 20
# Those that constraints.txt pins are taken in that version. The last two are other people's losses, to compare with.
PACKAGES = (
    "transformers", "tokenizers", "huggingface_hub", "peft", "accelerate", "bitsandbytes", "safetensors", "llguidance",
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "cryptography", "cffi",
    "pycparser", "rich", "markdown-it-py", "mdurl", "pygments", "typer", "click", "shellingham", "annotated-doc", "filelock",
    "fsspec", "httpx2", "httpcore2", "h11", "anyio", "sniffio", "idna", "certifi", "truststore", "hf-xet", "packaging",
    "PyYAML", "regex", "tqdm", "psutil", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")


def main() -> None:
    """Download and strip, and refuse a folder that is too large to carry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="130", help="the CUDA version of the machine's torch, such as 130")
    parser.add_argument("--out", type=Path, default=CARRIED)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("*.whl"):
        old.unlink()
    pinned = pins(Path(__file__).parents[2] / "constraints.txt")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--implementation", "cp", "--python-version", arguments.python, "--dest", str(arguments.out)]
    command += [flag for platform in platforms() for flag in ("--platform", platform)]
    subprocess.run([*command, *(pinned.get(normalised(name), name) for name in PACKAGES)], check=True)
    for wheel in arguments.out.glob("bitsandbytes-*.whl"):
        strip(wheel, {f"cuda{arguments.cuda}", "cpu"})
    total = sum(wheel.stat().st_size for wheel in arguments.out.glob("*.whl"))
    print(f"{arguments.out}: {total / 2**20:.1f} MiB")
    if total > MOST_BYTES:
        raise SystemExit(f"More than {MOST_BYTES >> 20} MiB: leave a package out.")


def pins(constraints: Path) -> dict[str, str]:
    """Name of a package, normalised -> `name==version`."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in constraints.read_text().splitlines()]
    return {normalised(line.partition("==")[0]): line for line in lines if "==" in line}


def normalised(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def platforms() -> list[str]:
    """The platform tags of wheels that run on a Linux of this decade."""
    return [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]


def strip(wheel: Path, kept: set[str]) -> None:
    """Leave only these libraries in a wheel of bitsandbytes.

    Raises:
        SystemExit: it does not have them.
    """
    part = wheel.with_suffix(".part")
    found = set()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            library = LIBRARY.fullmatch(item.filename)
            if library is None or library[1] in kept:
                target.writestr(item, source.read(item))
            if library is not None:
                found.add(library[1])
    if kept - found:
        part.unlink()
        raise SystemExit(
            f"{wheel.name} has no library for {', '.join(sorted(kept - found))}, only {', '.join(sorted(found))}."
        )
    part.replace(wheel)


if __name__ == "__main__":
    main()
