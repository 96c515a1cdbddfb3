#!/usr/bin/env bash
# Install, train two tasks on a real base, share them, switch between them, open the app.
# Usage: scripts/quickstart.sh [--headless] [--fresh]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=train,serve,app
case " $* " in *" --headless "*) extras=train,serve ;; esac # no app is opened then
bash scripts/install.sh "$extras"
exec "${VENV:-.venv}/bin/python" -m scripts.quickstart "$@"
