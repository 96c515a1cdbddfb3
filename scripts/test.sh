#!/usr/bin/env bash
# Install what the tests need, then format, lint, types and every test: the fast ones first.
# Usage: scripts/test.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
bin="${VENV:-.venv}/bin"

# The browser tests drive Chromium; without it they are skipped and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    echo "Installing Chromium for the browser tests."
    { $as_root apt-get -qq update && $as_root apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "Chromium could not be installed: the browser tests will be skipped."
fi

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
# The same commit gives the same answer: here hypothesis draws the same inputs every time, `pytest` alone draws new ones.
# One thread a process and two processes: the tests' models are tiny, and more threads only wait for each other.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --hypothesis-profile=ci -m "not slow and not soak" "$@"
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile --hypothesis-profile=ci -m "slow and not soak" "$@"
