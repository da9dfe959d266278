#!/usr/bin/env bash
# Exposure and gate in an environment of several turns: GRPO alone, and the 2x2 of exposure (full, learned) and gate (none,
# SDAR's) over it, at equal numbers of attempts: docs/evidence/agents.json. Five fresh seeds (10 to 14). Stop it with
# Ctrl-C; the same command continues. Settings were found on development seeds (LAB.md).
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/agents}
"$atesd" compare recipes/pico-agents.toml "$@" --arms grpo,grpo_opsd,sdar,atesd,sdar_atesd \
  --first-seed 10 --seeds "${SEEDS:-5}" --jobs "${JOBS:-0}" --out "$out"
"$python" repro/evidence.py agents "$out"
