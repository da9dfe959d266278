#!/usr/bin/env bash
# Exposure and gate in an environment of several turns: GRPO alone, and the 2x2 of exposure (full, learned) and gate (none,
# SDAR's) over it, at equal numbers of attempts: docs/evidence/agents.json. Ten fresh seeds. Stop it with Ctrl-C; the same
# command continues. Settings were found on development seeds (repro/agents_dev.sh, LAB.md).
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/agents}
"$atesd" compare recipes/pico-agents.toml "$@" --arms grpo,grpo_opsd,sdar,atesd,sdar_atesd \
  --first-seed 0 --seeds "${SEEDS:-10}" --jobs "${JOBS:-0}" --out "$out"
"$python" repro/evidence.py agents "$out"
