#!/usr/bin/env bash
# Learned exposure against the perplexity of the references over training: docs/evidence.md. About ten minutes on two
# cores. Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/curriculum}
"$atesd" compare recipes/pico-curriculum.toml --arms random_order,reverse_ppl,forward_ppl \
  --seeds "${SEEDS:-5}" --out "$out" "$@"
.venv/bin/python repro/evidence.py curriculum "$out"
.venv/bin/python repro/evidence.py comparison "$out" curriculum_accuracy random_order
