#!/usr/bin/env bash
# Development of recipes/pico-agents.toml, on seeds from 1000 on alone: at which coefficient and rate does distillation from
# the hinted teacher move success beyond noise, and do fixed ratios differ? Nothing of it is a result. Resumable.
# A run takes two to five minutes of processor time; COEFS, RATES, ARMS, SEEDS, JOBS and OUT narrow it down.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/agents-dev}
for lr in ${RATES:-1e-3 5e-4}; do
  "$atesd" compare recipes/pico-agents.toml "optim.lr=$lr" "$@" --arms grpo \
    --first-seed 1000 --seeds "${SEEDS:-2}" --jobs "${JOBS:-0}" --out "$out/grpo_lr_$lr"
  for coef in ${COEFS:-0.01 0.1 1}; do
    "$atesd" compare recipes/pico-agents.toml "optim.lr=$lr" 'gate={kind="none"}' "routing.coef=$coef" "$@" \
      --arms "${ARMS:-none,quarter,half,three_quarters,full}" \
      --first-seed 1000 --seeds "${SEEDS:-2}" --jobs "${JOBS:-0}" --out "$out/lr_${lr}_coef_$coef"
  done
done
