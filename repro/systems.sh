#!/usr/bin/env bash
# Systems of other papers on the embedded tier: docs/evidence.md. Fresh seeds from 20 on; settings were found on seed 1000
# (LAB.md). Some three hours of one core in all. Stop it with Ctrl-C; the same command continues. Parts can be named:
# repro/systems.sh longact dlr_codes dlr_arms retention_off paint avsd grpo_teacher retention.
#   longact        LongAct: which rows of the query and key projections learn
#   retention_off  Make Each Token Count: which tokens of a solution the teacher reads, at equal budgets of .1, .25 and
#                  .5, where the vice of the fully informed teacher is switched off
#   retention      the same at .25, with the vice
#   dlr_arms       DLR: exposure by search, selection and update
#   dlr_codes      DLR: latent codes that steer the student
#   paint          PAINT's target beside its reveal alone
#   avsd           AVSD's target of three views beside one of them
#   grpo_teacher   GRPO, RLSD and RetireOPD
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/systems}
parts=${*:-longact dlr_codes dlr_arms retention_off paint avsd grpo_teacher retention}
at_end=eval.every=1000
budgets=full,answer
for choice in gates prefix random_tokens random_segments; do budgets+=,${choice}_10,${choice}_25,${choice}_50; done
study() {
  "$atesd" compare "recipes/$2.toml" "${@:5}" --arms "$3" --first-seed 20 --seeds "${SEEDS:-5}" --jobs "${JOBS:-0}" --out "$out/$1"
  "$python" repro/evidence.py comparison "$out/$1" "$1" "$4" $pairs
}
for part in $parts; do
  pairs=
  case $part in
    longact)
      pairs="longact:random strict:random_strict"
      study longact pico-longact full,longact,strict,random,random_strict full ;;
    dlr_codes)
      pairs=codes:random
      study dlr_codes pico-dlr-codes codes,plain,random plain
      "$python" repro/evidence.py codes "$out/dlr_codes" ;;
    dlr_arms)
      pairs="dlr_arms:no_selection dlr_arms:learned dlr_arms:aligned_exposure dlr_arms:half aligned_exposure:learned"
      study dlr_arms pico-dlr-arms dlr_arms,no_selection,learned,aligned_exposure,quarter,half quarter "$at_end" ;;
    retention_off)
      test -d runs/warm_off || "$atesd" warmup --out runs/warm_off --shortcut 0
      for one in 10 25 50; do
        for other in prefix random_tokens random_segments; do pairs+=" gates_$one:${other}_$one"; done
      done
      study retention_off pico-retention "$budgets" full model.path=runs/warm_off "$at_end" ;;
    retention)
      pairs="gates_25:prefix_25 gates_25:random_tokens_25 gates_25:random_segments_25"
      study retention pico-retention full,answer,gates_25,prefix_25,random_tokens_25,random_segments_25 full "$at_end" ;;
    paint) study paint pico-lab overlap,paint overlap "$at_end" ;;
    avsd) study avsd pico-lab half,full,avsd half "$at_end" ;;
    grpo_teacher) study grpo_teacher pico-grpo grpo,rlsd,retire grpo step.num_steps=100 "$at_end" ;;
    *) echo "unknown part $part: see the head of this script" >&2; exit 2 ;;
  esac
done
