#!/usr/bin/env bash
# What docs/trust.md promises, counted: 200 damages, 40 kills, 300 hostile completions, 250 bad recipes. About a quarter of
# an hour on two quiet cores; ends with an error if a promise was broken.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python repro/trust.py --out "${OUT:-docs/evidence/trust.json}" "$@"
