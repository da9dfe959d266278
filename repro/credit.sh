#!/usr/bin/env bash
# Controllers beyond the Beta policy on the pico tier, five fresh seeds: docs/evidence.md. Forty minutes on two cores.
# Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/credit}
"$atesd" compare recipes/pico.toml --arms quarter,learned,influence,paired,difficulty,overlap,closed_form \
  --seeds "${SEEDS:-5}" --out "$out" "$@"
.venv/bin/python repro/evidence.py comparison "$out" credit quarter
