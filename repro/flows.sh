#!/usr/bin/env bash
# Does exposure matter for a flow? A ring of eight modes (ten seeds) and 8x8 images of digits (five) at fixed ratios, learned
# and credited exposure: docs/evidence/ring.json, digits.json. The ring's setting was found on seeds 1000 to 1002 (LAB.md).
# Runs take 13 and 22 s of processor time, so all of them some ten minutes on two idle cores. Stop it with Ctrl-C; the same
# command continues. Parts can be named: repro/flows.sh ring digits.
set -euo pipefail
cd "$(dirname "$0")/.."
atesd=${ATESD:-.venv/bin/atesd}
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/flows}
parts=${*:-ring digits}
study() {
  "$atesd" compare "recipes/$1-atesd.toml" --arms "$2" --first-seed 0 --seeds "${SEEDS:-$3}" --jobs "${JOBS:-0}" --out "$out/$1"
  "$python" repro/evidence.py comparison "$out/$1" "$1" full
}
for part in $parts; do
  case $part in
    ring) study ring none,quarter,half,full,learned,credited 10 ;;
    digits) study digits none,half,full,learned 5 ;;
    *) echo "unknown part $part: ring or digits" >&2; exit 2 ;;
  esac
done
