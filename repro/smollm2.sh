#!/usr/bin/env bash
# Does exposure matter on a real language model that nobody tuned to show it? SmolLM2-135M-Instruct, warmed up, every
# fixed ratio, learned and aligned exposure, full exposure with a gate, and supervised training: docs/evidence/smollm2.json.
# Three fresh seeds of nine arms on two cores take hours (ARMS=full,none,half,aligned,learned: what docs/evidence.md shows).
# Stop it with Ctrl-C; the same command continues. An allocator that keeps its memory saves a fifth (docs/performance.md).
# First: make smollm2, and settings found on development seeds (repro/smollm2_dev.sh, LAB.md).
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/smollm2}
recipe=recipes/smollm2-cpu-opsd.toml
test -d runs/smollm2-warm || "$atesd" warmup --model smollm2 --data "$recipe" task.data_seed=1 --out runs/smollm2-warm
"$atesd" compare "$recipe" "$@" --arms "${ARMS:-full,none,gated,sft,half,aligned,learned,quarter,three_quarters}" \
  --first-seed 0 --seeds "${SEEDS:-3}" --jobs "${JOBS:-0}" --out "$out"
test -f "$out-mismatch.json" || "$python" repro/mismatch.py "$recipe" "$out-mismatch.json"
"$python" repro/evidence.py smollm2 "$out" "$out-mismatch.json"
