#!/usr/bin/env bash
# One credit from graded rollouts against the best fixed ratio and the Beta policy, on three tiers: docs/evidence.md.
# Ten fresh seeds, about two hours on two cores. Stop it with Ctrl-C; the same command continues.
#   shortcut      the tier as it is: .25 is the best fixed ratio
#   no_shortcut   the vice of the fully informed teacher switched off: full exposure is the best
#   moving        hardest references first, so that the levels, and with them the best ratio, change during the run
# The best fixed ratios were found on other seeds (README, LAB.md).
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
out=${OUT:-runs/aligned}
test -d runs/warm_off || "$atesd" warmup --out runs/warm_off --shortcut 0
study() {
  "$atesd" compare recipes/pico.toml eval.every=150 "${@:2}" \
    --first-seed 100 --seeds "${SEEDS:-10}" --jobs 0 --out "$out/$1"
}
study shortcut --arms aligned,quarter,learned
study no_shortcut model.path=runs/warm_off --arms aligned,full,learned
study moving 'curriculum={kind="reverse_ppl"}' --arms aligned,half,learned
.venv/bin/python repro/evidence.py aligned "$out"
