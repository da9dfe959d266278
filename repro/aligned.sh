#!/usr/bin/env bash
# One credit from graded rollouts: docs/evidence.md. Ten fresh seeds (110 to 119 in the tiers, 100 to 109 elsewhere), some
# three to five hours on two cores. Stop it with Ctrl-C; the same command continues. Parts can be named:
# repro/aligned.sh tiers composition policy cost.
#   tiers        `aligned` against the best fixed ratio and the Beta policy
#                  shortcut      the tier as it is: .25 is the best fixed ratio
#                  no_shortcut   the vice of the fully informed teacher switched off: full exposure is the best
#                  moving        hardest references first, so that the levels, and with them the best ratio, change
#   composition  recipes/pico-aligned.toml with parts taken out, at equal numbers of completions
#   policy       is ATESD's controller learning? Its prior alone, draws around .5, ten times the decisions, credit as reward
#   cost         five pairs of runs, one at a time: on a machine that does nothing else
# The best fixed ratios were found on other seeds (README, LAB.md).
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/aligned}
parts=${*:-tiers composition policy cost}
study() {
  "$atesd" compare "$2" eval.every=150 "${@:3}" --first-seed "$first" --seeds "${SEEDS:-10}" --jobs "${JOBS:-0}" --out "$1"
}
for part in $parts; do
  first=100
  case $part in
    tiers)
      first=110
      test -d runs/warm_off || "$atesd" warmup --out runs/warm_off --shortcut 0
      study "$out/tiers/shortcut" recipes/pico.toml --arms aligned,quarter,learned
      study "$out/tiers/no_shortcut" recipes/pico.toml model.path=runs/warm_off --arms aligned,full,learned
      study "$out/tiers/moving" recipes/pico.toml 'curriculum={kind="reverse_ppl"}' --arms aligned,half,learned ;;
    composition)
      study "$out/composition" recipes/pico-aligned.toml eval.every=100 \
        --arms aligned,only_exposure,only_rl,half_exposure
      "$python" repro/evidence.py comparison "$out/composition" aligned_composition aligned ;;
    policy)
      study "$out/policy" recipes/pico.toml --arms learned,untrained,draws_half,often,learned_aligned,bandit
      "$python" repro/evidence.py comparison "$out/policy" policy learned ;;
    cost)
      "$atesd" compare recipes/pico.toml eval.every=150 --arms aligned,quarter \
        --first-seed 110 --seeds 5 --jobs 1 --out "$out/cost" ;;
    *) echo "unknown part $part: tiers, composition, policy or cost" >&2; exit 2 ;;
  esac
done
if [ -d "$out/tiers" ]; then
  "$python" repro/evidence.py aligned "$out/tiers" $([ -d "$out/cost" ] && echo "$out/cost")
fi
