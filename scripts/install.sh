#!/usr/bin/env bash
# Make .venv and install the project into it with the exact versions of constraints.txt.
# Usage: scripts/install.sh [EXTRA,...]   (extras of pyproject.toml; without any, the core alone).
# $VENV names another folder, $PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
venv=${VENV:-.venv}

python=
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Python 3.11 or newer is needed and was not found; install it and run this again." >&2
    exit 2
fi

stamp="$(cat pyproject.toml constraints.txt | cksum) [$extras] $PWD"
if [ -f "$venv/.installed" ] && grep -qxF "$stamp" "$venv/.installed"; then
    echo "Installed already in $venv."
    exit 0
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The default Linux wheel of torch brings gigabytes of CUDA; without a GPU the CPU build is wanted.
torch=$(grep '^torch==' constraints.txt)
if [ -n "$extras" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    echo "No GPU found: installing the CPU build of $torch."
    pip install --quiet "$torch+cpu" 2>/dev/null ||
        pip install --quiet --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
echo "Installing adapterhub-lite${extras:+ with $extras} into $venv (a few minutes the first time)."
pip install --quiet --constraint constraints.txt --editable ".${extras:+[$extras]}"
echo "$stamp" >>"$venv/.installed"
