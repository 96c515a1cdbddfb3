"""What does the registry lose when it is killed? Writes results/kills.json.

    python -m scripts.bench.keep.kills [--kills 200] [--seed 0]

A process that adds, moves aliases, pulls, removes and collects is killed with SIGKILL at random instants, each time in
another place; after each kill everything it had reported has to be there, and nothing half-visible. See
tests/registry/store/kill_driver.py, which does it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench.keep.hostile import make_sound
from scripts.bench.report import write_result

DRIVER = Path(__file__).parents[3] / "tests" / "registry" / "store" / "kill_driver.py"


def main() -> None:
    """Make adapters in a scratch folder, let the driver kill, write what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, adapter, parcel = make_sound(scratch)
        (scratch / "adapters").mkdir()
        adapter.rename(scratch / "adapters" / "one")
        command = [sys.executable, DRIVER, scratch / "home", parcel, scratch / "adapters", base.folder]
        start = time.perf_counter()
        words = [str(word) for word in (*command, wanted.kills, wanted.seed)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        seconds = round(time.perf_counter() - start, 1)
    found = json.loads(done.stdout)
    summary = {**found, "survived": found["kills"] if not found["wrong"] else None, "seconds": seconds}
    print(summary, write_result("kills", summary))


if __name__ == "__main__":
    main()
