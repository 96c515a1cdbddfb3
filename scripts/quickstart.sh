#!/usr/bin/env bash
# Install, train two tasks on a real base, share them, switch between them, open the app.
# Usage: scripts/quickstart.sh [--headless] [--fresh]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
exec "${VENV:-.venv}/bin/python" -m scripts.quickstart "$@"
