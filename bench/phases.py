"""Where the seconds of a step go, from the log of runs.

    python -m bench.phases runs/demo/learned/seed_0 [RUN_DIR...]
    python -m bench.phases                # 20 fresh steps of recipes/pico.toml with ATESD's exposure

Steps with an evaluation are left out: their time is mostly that of the evaluation.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from atesd.recipe import load_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

Row = Mapping[str, float]
ROOT = Path(__file__).parents[1]
ATESD = ('exposure={kind="beta"}', 'routing={kind="distil"}')


def share(rows: Sequence[Row], phase: str) -> float:
    """Return the share of a phase in all seconds of the steps."""
    return sum(row.get(f"time/{phase}_s", 0.0) for row in rows) / sum(row["time/step_s"] for row in rows)


def shares(rows: Sequence[Row], phase: str) -> list[float]:
    """Return the share of a phase in each step."""
    return [row.get(f"time/{phase}_s", 0.0) / row["time/step_s"] for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Return a line for every phase, the longest first; the rest is logging, statistics and hand-over."""
    keys = {key for row in rows for key in row if key.startswith("time/") and key.endswith("_s")}
    names = {key.removeprefix("time/").removesuffix("_s") for key in keys} - {"step", "tokens_per"}
    found = {name: share(rows, name) for name in names}
    lines = [f"{'phase':<12} {'share':>7} {'median s':>9} {'p95 s':>9}   ({len(rows)} steps)"]
    for name in ("step", *sorted(names, key=lambda name: -found[name])):
        middle, high = np.quantile([row.get(f"time/{name}_s", 0.0) for row in rows], [0.5, 0.95])
        lines.append(f"{name:<12} {found.get(name, 1.0):>7.1%} {middle:>9.4f} {high:>9.4f}")
    return "\n".join([*lines, f"{'rest':<12} {1 - sum(found.values()):>7.1%}"])


def logged(runs: Sequence[Path]) -> list[Row]:
    """Return the rows of the runs' steps that did not evaluate."""
    return [row for run in runs for row in RunDir.open(run).metrics() if row["step"] and "time/eval_s" not in row]


def main(runs: Sequence[Path]) -> None:
    """Print the table of the runs, or of a fresh one."""
    if runs:
        print(table(logged(runs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["step.num_steps=21", "eval.every=21", "eval.problems=4", *ATESD]
        config = load_config(ROOT / "recipes" / "pico.toml", overrides)
        Trainer.start(config, Path(folder) / "run").train()
        print(table(logged([Path(folder) / "run"])))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
