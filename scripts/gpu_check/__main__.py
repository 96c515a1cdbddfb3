"""Prove and measure on one GPU what no CPU can show, in at most eight minutes: `scripts/gpu_check.sh` calls it.

Each part has a limit of its own, and its results are written to the JSON file as soon as it ends, so that whatever comes
after, what was found is kept. What must be right comes first, then the figures. `--dry` runs every part on
the CPU with tiny sizes. The exit code is 1 when something was wrong, 3 when nothing was but a part did not finish.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.gpu_check.parts import END, LIMITS

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu-wheels"
RESULT = "gpu_check.json"
SECONDS, DRY_SECONDS, LEAST_SECONDS = 480, 1800, 5


def main() -> int:
    """Run the parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the result")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS), metavar="PART")
    parser.add_argument("--seconds", type=float, help=f"for all parts together; {SECONDS} without it")
    parser.add_argument("--wheels", type=Path, default=CARRIED, help="folder that `wheels` collected")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (DRY_SECONDS if arguments.dry else SECONDS)
    end = time.monotonic() + seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "dry": arguments.dry,
        "parts": {},
    }
    left = [name for name in LIMITS if name in arguments.only]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        worker = Worker(Path(folder), arguments.dry, unpacked(arguments.wheels, Path(folder) / "packages"))
        while left:
            name, rest = left[0], left[1:]
            limit = min(seconds if arguments.dry else LIMITS[name], end - time.monotonic())
            found = worker.run(left, limit) if limit > LEAST_SECONDS else NO_TIME
            whole["parts"][name], left = found, rest
            (arguments.out / RESULT).write_text(json.dumps(whole, indent=1) + "\n")
            print(summary(name, found), flush=True)
        worker.stop()
    return verdict(whole["parts"])


NO_TIME: dict[str, Any] = {"ended": "not begun: no time was left", "seconds": 0.0, "results": []}


class Worker:
    """The process that runs part after part; a new one after a part that failed or was ended at its limit."""

    def __init__(self, scratch: Path, dry: bool, packages: Path | None) -> None:
        self.scratch, self.dry, self.packages = scratch, dry, packages
        self.child: subprocess.Popen[bytes] | None = None
        self.log = scratch / "log"

    def run(self, names: list[str], limit: float) -> dict[str, Any]:
        """Wait for the first of `names`, and end it at its limit in seconds; what it found up to then is returned."""
        if self.child is None:
            self._start(names)
        assert self.child is not None
        lines, began, ended = (
            self.scratch / f"{names[0]}.jsonl",
            time.monotonic(),
            f"ended at its limit of {limit:.0f} s",
        )
        while time.monotonic() - began < limit:
            gone = self.child.poll()
            found = read_lines(lines)
            if found and END in found[-1]:
                return {"ended": "finished", "seconds": found[-1][END], "results": found[:-1]}
            if gone is not None:
                ended = f"failed with exit code {gone}"
                break
            time.sleep(0.1)
        self.stop()
        seconds, log = round(time.monotonic() - began, 1), self.log.read_text(errors="replace")[-4000:]
        return {"ended": ended, "seconds": seconds, "results": read_lines(lines), "log": log}

    def _start(self, names: list[str]) -> None:
        command = [sys.executable, "-m", "scripts.gpu_check.parts", str(self.scratch), *names]
        command += ["--dry"] if self.dry else []
        command += ["--packages", str(self.packages)] if self.packages else []
        own = {"ADAPTERHUB_HOME": str(self.scratch / "home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if self.dry else {}
        with self.log.open("w") as out:
            self.child = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **own},
                start_new_session=True,
            )

    def stop(self) -> None:
        """End the process and what it started."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            self.child = None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one may have been cut."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def unpacked(wheels: Path, folder: Path) -> Path | None:
    """The folder of the carried packages, None without any. A wheel is a zip archive; no installer is needed.

    Raises:
        SystemExit: they are for another Python.
    """
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    others = {tag[1] for wheel in found if (tag := re.search(r"-(cp\d+)-cp\d+-", wheel.name)) and tag[1] != here}
    if others:
        raise SystemExit(
            f"{wheels} holds packages for {', '.join(sorted(others))}, and {sys.executable} is {here}. Collect them again "
            "with `python -m scripts.gpu_check.wheels --python VERSION`, or give another folder with --wheels."
        )
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder if found else None


def summary(name: str, found: dict[str, Any]) -> str:
    """One line of a part, and one for each result that is wrong."""
    wrong = [one for one in found["results"] if one.get("ok") is False]
    proven = sum(one.get("ok") is True for one in found["results"])
    head = f"{name}: {found['ended']} after {found['seconds']} s; {len(found['results'])} results, {proven} right, {len(wrong)} wrong"
    return "\n".join([head, *(f"  WRONG {json.dumps(one)[:600]}" for one in wrong)])


def verdict(parts: dict[str, dict[str, Any]]) -> int:
    """The exit code: 1 when something is wrong, 3 when a part was cut short, else 0."""
    if any(one.get("ok") is False for part in parts.values() for one in part["results"]):
        return 1
    if any(part["ended"].startswith("failed") for part in parts.values()):
        return 1
    return 3 if any(part["ended"] != "finished" for part in parts.values()) else 0


def commit() -> str | None:
    """The commit of the checkout, where there is git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
