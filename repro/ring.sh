#!/usr/bin/env bash
# Does exposure matter for a flow? A ring of eight modes at fixed ratios, learned and credited exposure, ten
# seeds (the setting was found on seeds 1000 to 1002, LAB.md): docs/evidence/ring.json. A run takes some 13 s of processor
# time on one core, so 60 of them some seven minutes on two idle ones. Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/ring}
"$atesd" compare recipes/ring-atesd.toml --arms none,quarter,half,full,learned,credited \
  --first-seed 0 --seeds "${SEEDS:-10}" --jobs "${JOBS:-0}" --out "$out" "$@"
"${PYTHON:-.venv/bin/python}" repro/evidence.py comparison "$out" ring full
