#!/usr/bin/env bash
# The composition with each part taken out: docs/evidence.md. About half an hour on two cores for five seeds.
# Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/ablation}
"$atesd" compare recipes/pico-composed.toml \
  --arms composed,full_exposure,half_exposure,no_gate,random_order,no_router,no_router_no_lambda,only_exposure,only_rl \
  --seeds "${SEEDS:-5}" --out "$out" "$@"
.venv/bin/python repro/evidence.py comparison "$out" ablation composed
