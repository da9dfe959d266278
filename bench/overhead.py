"""Share of a step that exposure control and the probe take, from a run's log.

    python bench/overhead.py runs/demo/learned/seed_0 [RUN_DIR...]

Steps with an evaluation are left out: their time is mostly that of the evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from atesd.runlog import RunDir


def main(runs: list[Path]) -> None:
    """Print median and 95th percentile over the steps of all runs."""
    rows = [row for run in runs for row in RunDir.open(run).metrics() if row["step"] and "time/eval_s" not in row]
    for name in ("exposure", "probe"):
        shares = [row[f"time/{name}_s"] / row["time/step_s"] for row in rows]
        middle, high = np.quantile(shares, [0.5, 0.95])
        print(f"{name}: median {middle:.1%} of a step, 95th percentile {high:.1%} ({len(rows)} steps)")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
