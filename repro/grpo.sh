#!/usr/bin/env bash
# Pure reinforcement from the packaged warm start: docs/evidence.md. About six minutes on two cores.
# Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/grpo}
"$atesd" compare recipes/pico-grpo.toml --arms grpo --first-seed 3 --seeds "${SEEDS:-5}" --out "$out" "$@"
.venv/bin/python repro/evidence.py comparison "$out" grpo grpo
