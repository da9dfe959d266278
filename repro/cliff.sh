#!/usr/bin/env bash
# The sweep of lambda across lambda* on a format that the base leaves open: docs/evidence.md. Twenty minutes on two cores.
# Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/cliff}
test -d runs/cliff/base || .venv/bin/python repro/cliff_base.py runs/cliff/base
"$atesd" compare recipes/pico-cliff.toml --arms 1.00,1.10,1.20,1.25,1.30,1.50,2.00,3.00,5.00,guarded \
  --seeds "${SEEDS:-3}" --out "$out/sweep" "$@"
.venv/bin/python repro/evidence.py cliff "$out/sweep"
