#!/usr/bin/env bash
# Development of recipes/smollm2-cpu-*.toml, on seeds from 1000 on alone: at which learning rate does full exposure move
# held-out accuracy, and where does it collapse? Some two hours on two cores; nothing of it is a result. Resumable.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/smollm2-dev}
recipe=recipes/smollm2-cpu-opsd.toml
test -d runs/smollm2-warm || "$atesd" warmup --model smollm2 --data "$recipe" task.data_seed=1 --out runs/smollm2-warm
for lr in ${RATES:-1e-4 2e-4 4e-4}; do
  "$atesd" compare "$recipe" "optim.lr=$lr" eval.every=8 "$@" --arms "${ARMS:-full}" \
    --first-seed 1000 --seeds "${SEEDS:-1}" --jobs "${JOBS:-0}" --out "$out/lr_$lr"
done
