#!/usr/bin/env bash
# Prove and measure on one GPU, in at most eight minutes, what no CPU can show; the result is DIR/gpu_check.json.
# Usage: scripts/gpu_check.sh [--out DIR] [--dry] [--only PART...] [--seconds N]
# Nothing is installed: $PYTHON needs torch, triton and numpy; the rest comes from .gpu-wheels, which
# `python -m scripts.gpu_check.wheels` collects on a machine with a network, or is installed already.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/app${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m scripts.gpu_check "$@"
