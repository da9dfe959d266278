#!/usr/bin/env bash
# Pure reinforcement from the packaged warm start: docs/evidence.md. About four minutes on two cores.
# Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/grpo}
"$atesd" compare recipes/pico-grpo.toml --arms grpo --seeds "${SEEDS:-3}" --out "$out" "$@"
.venv/bin/python repro/evidence.py comparison "$out" grpo grpo
