#!/usr/bin/env bash
# The table and figure of the README: every arm on the pico tier with ten fresh seeds (the tier was designed on seeds
# 1000 to 1004). Some 30 to 70 minutes on two cores. Stop it with Ctrl-C; the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
"$atesd" compare recipes/pico.toml \
  --arms full,three_quarters,half,quarter,none,random,learned,learned_no_gt,sft \
  --seeds "${SEEDS:-10}" --out "${OUT:-runs/pico}" "$@"
cp "${OUT:-runs/pico}/summary.json" docs/pico-summary.json
.venv/bin/python -c "import sys; from pathlib import Path; sys.path.insert(0, 'repro'); from figure import write_figure
write_figure(Path(sys.argv[1]), Path('docs/pico.svg'))" "${OUT:-runs/pico}"
